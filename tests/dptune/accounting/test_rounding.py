"""Everywhere in the project, a shown epsilon is never below the exact one, and only slightly above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dptune.accounting import epsilon
from dptune.accounting.rounding import rounded_up, rounded_up_to_figures

ROOT = Path(__file__).parents[3]
EPSILONS = st.floats(min_value=0, max_value=1e9, allow_nan=False)


@given(EPSILONS, st.integers(0, 8), st.booleans())
@example(0.88 + 1e-12, 2, False)
@example(8.0, 4, False)
def test_what_is_shown_is_a_bound_and_a_close_one(value: float, digits: int, trim: bool) -> None:
    text = rounded_up(value, digits, trim=trim)
    assert float(text) >= value
    with localcontext(prec=400):
        assert Decimal(text) - Decimal(repr(value)) < Decimal(1).scaleb(-digits)
    assert trim or len(text.partition(".")[2]) == digits


@given(st.floats(min_value=1e-12, max_value=1e9), st.integers(1, 6))
def test_figures_are_a_bound_and_a_close_one(value: float, figures: int) -> None:
    text = rounded_up_to_figures(value, figures)
    assert float(text) >= value
    assert Decimal(text) - Decimal(repr(value)) < Decimal(1).scaleb(Decimal(repr(value)).adjusted() - figures + 2)
    assert float(f"{float(text):.{figures}g}") >= value, "transformers prints logged numbers so"


def test_an_epsilon_that_half_up_would_understate() -> None:
    spent = epsilon(noise_multiplier=1.1, sampling_probability=0.01, steps=200, delta=1e-5)
    assert float(f"{spent:.2f}") < spent <= float(rounded_up(spent, 2))


def test_what_is_no_number_is_shown_as_it_is() -> None:
    assert (rounded_up(float("inf")), rounded_up_to_figures(float("inf")), rounded_up_to_figures(0.0)) == (
        "inf", "inf", "0")  # fmt: skip


def product_files() -> Iterator[Path]:
    """Every module that is not a test."""
    yield from ROOT.glob("*.py")
    for name in ("dptune", "utils", "scripts", "benchmarks"):
        yield from (ROOT / name).rglob("*.py")


NAMED = re.compile(r"epsilon|\beps\b|\bcost\.|\bspent\b")  # a constant (in capitals) is exact


def formatted_epsilons(source: str) -> list[str]:
    """Names of epsilons that a module formats or rounds itself instead of using `rounded_up`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            text = ast.unparse(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("round", "format") and node.args:
            text = ast.unparse(node.args[0])
        else:
            continue
        if NAMED.search(text) and "rounded_up" not in text:
            found.append(text)
    return found


def test_no_epsilon_is_formatted_by_a_specification() -> None:
    found = {str(path.relative_to(ROOT)): texts for path in product_files()
             if (texts := formatted_epsilons(path.read_text(encoding="utf-8")))}  # fmt: skip
    assert found == {}


def test_no_epsilon_of_the_documents_code_is_formatted_by_a_specification() -> None:
    formatted = re.compile(r"\{[^{}]*epsilon[^{}]*:\.\d\w\}")
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md")]
    assert {page.name: found for page in pages if (found := formatted.findall(page.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("f'{statement.epsilon:.4f}'", ["statement.epsilon"]),
        ("f'{plan.privacy.planned_epsilon():.4f} {delta:g}'", ["plan.privacy.planned_epsilon()"]),
        ("round(report['epsilon'], 3)", ["report['epsilon']"]),
        ("f'{rounded_up(epsilon):>9} {epsilon}'", []),
    ],
)
def test_a_formatted_epsilon_is_found(source: str, found: list[str]) -> None:
    assert formatted_epsilons(source) == found
