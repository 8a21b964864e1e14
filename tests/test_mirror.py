"""Tests mirror the modules: what `dptune/run/plan.py` decides is tested in `tests/dptune/run/test_plan.py`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Modules without a test of their own name, and where they are tested instead.
EXCEPTIONS = {
    "dptune/accounting/spend.py": "a record without logic; test_accounting.py checks its values",
    "utils/training/task.py": "a protocol and a record without logic; test_loop.py and test_run.py drive a task",
}


def has_logic(source: str) -> bool:
    """Whether a module defines a function or a class; constants and re-exports are no logic."""
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(source).body)


def mirror_of(module: Path) -> Path:
    """The test file of a module, both relative to the root; a package's is named after the package."""
    package = module.parent
    name = package.name if module.stem == "__init__" and package.parent.name else module.stem
    return "tests" / package / f"test_{name.strip('_')}.py"


MODULES = sorted(path.relative_to(ROOT) for package in ("dptune", "utils") for path in ROOT.glob(f"{package}/**/*.py"))


def test_every_module_with_logic_has_a_test_of_its_name() -> None:
    wanting = {
        str(one) for one in MODULES if has_logic((ROOT / one).read_text()) and not (ROOT / mirror_of(one)).exists()
    }
    assert wanting == EXCEPTIONS.keys()


def test_every_test_of_a_module_finds_it() -> None:
    """Tests that span modules have names of their own, but stand in a folder that is there."""
    folders = {path.parent for path in MODULES}
    tests = [path.relative_to(ROOT / "tests") for path in ROOT.glob("tests/*/**/test_*.py")]
    of_modules = [path for path in tests if path.parts[0] in ("dptune", "utils")]
    assert len(of_modules) > 100
    assert {str(path.parent) for path in of_modules} <= {str(folder) for folder in folders}


@pytest.mark.parametrize(
    ("module", "test"),
    [
        ("dptune/run/plan.py", "tests/dptune/run/test_plan.py"),
        ("dptune/_files.py", "tests/dptune/test_files.py"),
        ("dptune/accounting/__init__.py", "tests/dptune/accounting/test_accounting.py"),
        ("dptune/accounting/__main__.py", "tests/dptune/accounting/test_main.py"),
        ("dptune/__init__.py", "tests/dptune/test_init.py"),
    ],
)
def test_the_names_are_as_written(module: str, test: str) -> None:
    assert str(mirror_of(Path(module))) == test


@pytest.mark.parametrize(("source", "logic"), [("A = 1", False), ("from x import y", False), ("class A: ...", True)])
def test_what_counts_as_logic(source: str, logic: bool) -> None:
    assert has_logic(source) is logic
