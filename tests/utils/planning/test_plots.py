"""The plot: noise over signal by time, as the search has it, and a PNG of all panels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dptune.run.noise_ratios import noise_over_signal
from tests.fitted_rule import quick_noise
from utils.planning import plots
from utils.planning.plots import plot_trade, points
from utils.planning.search import Limits, quietest
from utils.planning.speed import Speed

LIMITS = Limits(num_examples=500, tokens_per_example=10.0, delta=1e-4, seconds=400.0, speed=Speed(100.0, 0.0, ""))


def test_a_point_is_the_noise_over_the_signal_of_the_steps_that_the_time_allows() -> None:
    with quick_noise():
        hours, noise = points(LIMITS, 64, 8.0, 1000)
        config = quietest(LIMITS, 64, 8.0)
    assert config is not None
    assert hours == pytest.approx([share * 400 / 3600 for share in (0.25, 0.5, 1, 2, 4)], rel=0.07), "in whole steps"
    assert hours[2] == LIMITS.hours(config) == config.steps * 6.4 / 3600
    assert noise[2] == noise_over_signal(config, 1000)
    assert noise == sorted(noise, reverse=True), "more time, less noise"


def test_times_that_are_too_short_are_left_out() -> None:
    short = replace(LIMITS, seconds=10.0)
    with quick_noise():
        hours, _ = points(short, 128, 8.0, 10)
        longest, _ = points(replace(LIMITS, most_steps=40), 64, 8.0, 10)
    assert hours == [steps * 12.8 / 3600 for steps in (1, 3)]
    assert longest[2:] == [40 * 6.4 / 3600] * 3


def test_all_panels_and_batches_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def recorded(_: Limits, batch: int, epsilon: float, trained: int) -> tuple[list[float], list[float]]:
        drawn.append((batch, epsilon, trained))
        return [0.1, 0.2], [1.0, 0.5]

    monkeypatch.setattr(plots, "points", recorded)
    options = [SimpleNamespace(expected_batch_size=float(batch)) for batch in (32, 64)]
    proposal: Any = SimpleNamespace(limits=LIMITS, trained=7, around=lambda count: options[:count])
    plot_trade(tmp_path / "plot.png", proposal, (1.0, 8.0))
    assert drawn == [(batch, epsilon, 7) for epsilon in (1.0, 8.0) for batch in (32, 64)]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [one.name for one in tmp_path.iterdir()] == ["plot.png"]
