"""The rule is the formula of its docstring; it says what it keeps and where it is a guess; it survives its file."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fit_planner import fit_rule, read_runs
from dptune._validate import InvalidArgument
from tests.fitted_rule import RULE
from utils.planning.rule import read_rule, write_rule

ROOT = Path(__file__).parents[3]


def test_the_loss_is_the_formula() -> None:
    kept = 1 / (1 + (60 * 0.02 * 100**-0.2) ** 0.8)
    assert RULE.kept(100, 0.02) == pytest.approx(kept)
    assert RULE.loss(100, 0.02) == pytest.approx(5 - kept * (5 - 1.5 - 8 * 100**-0.5))
    assert RULE.loss(100, 0.0) == pytest.approx(1.5 + 0.8)
    assert RULE.learning_rate(100, 0.02, 4) == pytest.approx(2e-2 * 0.02**0.25 * 100**-0.1 * 4**0.3)


def test_what_is_kept_falls_from_all_to_nothing() -> None:
    shares = [RULE.kept(100, ratio) for ratio in (0, 0.01, 0.1, 1)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert RULE.loss(100, 1e9) == pytest.approx(RULE.start)
    for share in (0.2, 0.5, 0.9):
        assert RULE.kept(100, RULE.ratio_that_keeps(share, 100)) == pytest.approx(share)


def test_too_few_steps_gain_nothing_with_and_without_noise() -> None:
    assert [RULE.loss(2, ratio) for ratio in (0.0, 0.1)] == [RULE.start, RULE.start]


def test_outside_the_range_is_told() -> None:
    assert RULE.outside(25, 0.1, 8) == []
    assert RULE.outside(1000, 0.2, 16) == ["1,000 steps", "noise over batch 0.2", "16 noise bands"]
    assert RULE.in_words.endswith("25 to 400 steps, noise over batch 0.001 to 0.1, up to 8 noise bands")
    assert replace(RULE, bands=1).in_words.endswith(", independent noise")


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


def test_the_committed_rule_is_the_fit_of_the_committed_runs() -> None:
    rule = read_rule()
    fitted, _ = fit_rule(read_runs(ROOT / rule.data), source=rule.source, data=rule.data, parameters=rule.parameters)
    for steps, ratio in ((rule.steps[0], rule.ratios[1]), (rule.steps[1], rule.ratios[0]), (rule.steps[1], 0.0)):
        assert rule.loss(steps, ratio) == pytest.approx(fitted.loss(steps, ratio), abs=1e-3)
    assert rule.rate == pytest.approx(fitted.rate, rel=1e-3)
    assert (rule.steps, rule.whole) == (fitted.steps, fitted.whole)
    assert rule.error == pytest.approx(fitted.error, abs=1e-3)
    with (ROOT / rule.data).open(encoding="utf-8") as file:
        steps = [int(run["steps"]) for run in csv.DictReader(file)]
    assert rule.steps == (min(steps), max(steps))


def test_by_the_committed_rule_steps_help_and_noise_hurts() -> None:
    rule = read_rule()
    (least, most), (low, high) = rule.steps, rule.ratios
    assert rule.loss(least, low) > rule.loss(most, low)
    assert rule.loss(most, low) < rule.loss(most, high)
    assert rule.error < 0.2 * (rule.start - rule.loss(most, low)), "the rule tells little"
