"""The rule is the formula of its docstring; it says what it keeps and where it is a guess; it survives its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from tests.fitted_rule import RULE
from utils.planning.rule import read_rule, write_rule


def test_the_loss_is_the_formula() -> None:
    assert RULE.loss(100, 0.02) == pytest.approx(1.5 + 8 * 100**-0.5 + 30 * (0.02 * 100**-0.3) ** 0.9)
    assert RULE.loss(100, 0.0) == pytest.approx(1.5 + 0.8)
    assert RULE.learning_rate(100, 0.02, 4) == pytest.approx(2e-2 * 0.02**0.25 * 100**-0.1 * 4**0.3)


def test_what_is_kept_falls_from_all_to_nothing() -> None:
    shares = [RULE.kept(100, ratio) for ratio in (0, 0.01, 0.1, 1)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0, "worse than before training"
    for share in (0.2, 0.5, 0.9):
        assert RULE.kept(100, RULE.ratio_that_keeps(share, 100)) == pytest.approx(share)


def test_steps_that_learn_nothing_even_without_noise_keep_nothing() -> None:
    useless = replace(RULE, start=1.0)
    assert useless.ratio_that_keeps(0.5, 100) == 0
    assert useless.kept(100, 0.01) == 0


def test_outside_the_range_is_told() -> None:
    assert RULE.outside(25, 0.1, 8) == []
    assert RULE.outside(1000, 0.2, 16) == ["1,000 steps", "noise over batch 0.2", "16 noise bands"]
    assert "25 to 400 steps, noise over batch 0.001 to 0.1" in RULE.in_words


def test_a_file_keeps_the_rule(tmp_path: Path) -> None:
    write_rule(tmp_path / "rule.json", RULE)
    assert read_rule(tmp_path / "rule.json") == RULE


@pytest.mark.parametrize("text", [None, "{", "[]", '{"start": 1}'])
def test_what_is_no_rule_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"rule='.*rule.json': holds no fitted rule .*; run benchmarks/fit_plan"):
        read_rule(path)
