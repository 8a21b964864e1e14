"""The fit finds the rule that runs were made with, and refuses files that it cannot fit."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fit_planner import COLUMNS, best_points, fit_rate, fit_rule, left_out_errors, main, page, read_runs
from dptune._validate import InvalidArgument
from tests.fitted_rule import RULE
from utils.planning.rule import read_rule

STEPS, RATIOS = (25, 50, 100, 200, 400), (0.002, 0.01, 0.03, 0.08)
RATES = np.geomspace(1e-3, 5e-2, 9)


def made_up(path: Path, **changes: object) -> Path:
    """Runs by the rule, with a loss that grows with the distance of the rate from the best, and two seeds."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for steps, ratio, rate, seed in itertools.product(STEPS, RATIOS, RATES, (0, 1)):
            bands = 4 if ratio < 0.02 else 1
            off = np.log(rate / RULE.learning_rate(steps, ratio, bands)) ** 2
            nearest = min(np.log(RATES / RULE.learning_rate(steps, ratio, bands)) ** 2)
            loss = RULE.loss(steps, ratio) + off - nearest + 0.01 * (2 * seed - 1)
            row = dict(zip(COLUMNS, ("m", 20_000, 64, steps, ratio, bands, rate, seed, RULE.start, loss), strict=True))
            writer.writerow(row | changes)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return read_runs(made_up(tmp_path_factory.mktemp("runs") / "runs.csv"))


def test_the_fit_finds_the_rule(runs: list[dict[str, str]]) -> None:
    rule, points = fit_rule(runs, source="made-up runs", data="none", parameters=20_000)
    assert len(points) == len(STEPS) * len(RATIOS)
    for steps, ratio in ((25, 0.002), (400, 0.08), (150, 0.02), (300, 0.0)):
        assert rule.loss(steps, ratio) == pytest.approx(RULE.loss(steps, ratio), abs=5e-3)
    assert (rule.alpha, rule.beta, rule.gamma) == pytest.approx((RULE.alpha, RULE.beta, RULE.gamma), abs=0.02)
    assert rule.learning_rate(100, 0.01, 4) == pytest.approx(RULE.learning_rate(100, 0.01, 4), rel=0.15)
    assert (rule.steps, rule.ratios, rule.start, rule.whole) == ((25, 400), (0.002, 0.08), 5.0, True)
    assert rule.bands == 4
    assert rule.error < 0.01


def test_the_best_rate_counts_averaged_over_seeds(runs: list[dict[str, str]]) -> None:
    (point,) = [one for one in best_points(runs) if (one.steps, one.ratio) == (100, 0.03)]
    assert point.rate == pytest.approx(RULE.learning_rate(100, 0.03, 1), rel=1e-6), "between the tried ones"
    assert min(abs(np.log(RATES / point.rate))) > 0.01
    assert point.loss == pytest.approx(RULE.loss(100, 0.03))
    assert not point.at_edge
    assert best_points([one for one in runs if float(one["rate"]) < 2e-3])[0].at_edge


def test_what_does_not_vary_has_no_exponent(runs: list[dict[str, str]]) -> None:
    independent = [one for one in best_points(runs) if one.bands == 1]
    factor, by_noise, by_steps, by_bands = fit_rate(independent)
    assert by_bands == 0
    assert factor * 0.05**by_noise * 100**by_steps == pytest.approx(RULE.learning_rate(100, 0.05, 1), rel=0.3)


def test_a_point_off_the_rule_shows_among_the_errors(runs: list[dict[str, str]]) -> None:
    points = best_points(runs)
    points[7] = points[7]._replace(loss=points[7].loss + 1)
    errors = left_out_errors(points, RULE.start)
    assert errors[7] == pytest.approx(-1, abs=0.1)
    assert np.median(np.abs(errors)) < 0.2


def test_the_program_writes_the_rule_and_a_page_of_errors(tmp_path: Path) -> None:
    data, rule, output = (tmp_path / name for name in ("runs.csv", "rule.json", "fit.md"))
    made_up(data)
    words = [data, "--source", "made-up runs", "--parameters", 20_000, "--rule", rule, "--output", output]
    main([str(word) for word in words])
    read = read_rule(rule)
    assert (read.data, read.parameters) == (str(data), 20_000)
    text = output.read_text()
    assert f"{read.error:.3f} nats per token" in text
    assert text.count("\n| ") == 2 + len(STEPS) * len(RATIOS)


def test_the_page_marks_rates_at_the_edge(runs: list[dict[str, str]]) -> None:
    points = [one._replace(at_edge=True) for one in best_points(runs)[:1]]
    assert "(edge)" in page(RULE, points, [0.1])[-1]


def test_runs_of_several_models_are_refused(tmp_path: Path) -> None:
    one, other = made_up(tmp_path / "one.csv"), made_up(tmp_path / "other.csv", model="n")
    (tmp_path / "both.csv").write_text(one.read_text() + other.read_text().partition("\n")[2])
    with pytest.raises(InvalidArgument, match=r"several values of model \(m, n\); give a file for each"):
        read_runs(tmp_path / "both.csv")


def test_a_file_without_runs_or_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(InvalidArgument, match="lacks runs"):
        read_runs(path)
    path.write_text("model,steps\nm,1\n")
    with pytest.raises(InvalidArgument, match="lacks trained, rows_tokens, noise_batch_ratio"):
        read_runs(path)


def test_too_few_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: list[dict[str, str]]
) -> None:
    with pytest.raises(InvalidArgument, match="runs=4: settings are too few; measure at least 8"):
        fit_rule([one for one in runs if one["steps"] == "25"], source="", data="", parameters=1)
    (tmp_path / "runs.csv").write_text("model\n")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "runs.csv"), "--source", "s", "--parameters", "1"])
    assert ended.value.code == 2
    assert "lacks runs" in capsys.readouterr().err
