"""The search: steps that the time allows, noise that keeps the epsilon, the best by the rule, rows that it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from dptune.accounting.data_needed import Work
from dptune.run.noise_ratios import noise_batch_ratio
from dptune.run.plan import make_plan
from dptune.run.settings import PrivacySettings
from tests.fitted_rule import RULE, quick_noise
from utils.planning import search
from utils.planning.search import ENOUGH, Limits, best, candidates, examples_needed, kept, quietest
from utils.planning.speed import Speed

LIMITS = Limits(num_examples=2_000, tokens_per_example=50.0, delta=1e-5, seconds=1_000.0, speed=Speed(1e3, 0.5, ""))


def test_steps_are_what_the_time_allows() -> None:
    assert LIMITS.steps(100) == 181  # of 5.5 seconds each
    assert replace(LIMITS, seconds=1e9, most_steps=300).steps(100) == 300


def test_batches_are_powers_of_two_for_each_process_with_time_for_a_step() -> None:
    assert LIMITS.batches() == [2**power for power in range(11)]
    assert replace(LIMITS, processes=3).batches() == [3 * 2**power for power in range(10)]
    assert replace(LIMITS, seconds=10).batches() == [2**power for power in range(8)]


def test_batches_that_leave_time_over_are_left_out_but_for_the_largest() -> None:
    seconds = LIMITS.most_steps * LIMITS.speed.seconds(64, 50.0)
    assert replace(LIMITS, seconds=seconds).batches()[:2] == [64, 128]
    assert replace(LIMITS, seconds=1e12).batches() == [1024]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seconds": 0.36}, r"^hours='0.0001': one step takes 0.00015 hours; give more time or more devices"),
        ({"processes": 2_001}, r"^num_examples=2000: give at least one for each of the 2001 processes"),
    ],
)
def test_what_leaves_no_batch_is_refused(changes: dict[str, float], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        replace(LIMITS, **changes).batches()  # type: ignore[arg-type]


def test_the_noise_keeps_the_epsilon_and_is_at_most_a_little_more_than_a_run_needs() -> None:
    limits = replace(LIMITS, seconds=100.0)
    found = quietest(limits, 128, 8.0)
    assert found is not None
    assert found.steps == limits.steps(128)
    assert found.planned_epsilon() <= 8
    assert found.noise_bands > 1

    def exact(bands: int) -> float:
        settings = PrivacySettings(target_epsilon=8.0, delta=1e-5, noise_bands=bands)
        config = make_plan(settings, num_examples=2_000, batch=128, steps=found.steps).privacy
        assert config is not None
        return noise_batch_ratio(config)

    assert 1 <= noise_batch_ratio(found) / exact(found.noise_bands) < 1.06
    assert exact(found.noise_bands) < exact(1)


@pytest.mark.parametrize(
    ("noise", "bands"),
    [
        ({1: 1.0, 2: 0.5, 4: 0.9, 8: 0.1}, 2),
        ({1: 1.0, 2: 0.97, 4: 0.94, 8: 0.93, 16: 0.94}, 8),
        ({1: 1.0, 2: 1.01}, 1),
    ],
)
def test_bands_are_tried_until_noise_grows(
    noise: dict[int, float], bands: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "noise_batch_ratio", lambda config: noise[config.noise_bands])
    with quick_noise():
        found = quietest(LIMITS, 32, 7.5)
    assert found is not None
    assert found.noise_bands == bands


@pytest.mark.parametrize("most", [1, 4, 16])
def test_no_more_bands_than_may_be_kept(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "noise_batch_ratio", lambda config: 1 / config.noise_bands)
    with quick_noise():
        found = quietest(replace(LIMITS, most_bands=most), 32, 7.5)
    assert found is not None
    assert found.noise_bands == most


def test_the_best_has_the_least_loss_by_the_rule() -> None:
    with quick_noise():
        options = candidates(LIMITS, 2.0)
    losses = {one.expected_batch_size: RULE.loss(one.steps, noise_batch_ratio(one)) for one in options}
    chosen = best(options, RULE)
    assert losses[chosen.expected_batch_size] == min(losses.values())
    careless = best(options, replace(RULE, noise=1e-6))
    assert careless.expected_batch_size < chosen.expected_batch_size, "without noise more steps are better"


def test_the_time_is_halved_while_that_is_better() -> None:
    """With this exponent of T the noise of more steps outweighs what they learn."""
    with quick_noise():
        limits, options = search.search(LIMITS, 2.0, RULE)
        assert (limits, options) == (LIMITS, candidates(LIMITS, 2.0))
        loud = replace(RULE, beta=0.5, alpha=2.0)
        limits, options = search.search(LIMITS, 2.0, loud)
        losses = [
            min(loud.loss(one.steps, noise_batch_ratio(one)) for one in candidates(timed, 2.0))
            for timed in (replace(LIMITS, seconds=LIMITS.seconds / 2**power) for power in range(9))
        ]
        assert options == candidates(limits, 2.0)
    halved = np.log2(LIMITS.seconds / limits.seconds)
    assert halved >= 1
    assert losses[int(halved)] == min(losses)


def test_an_epsilon_that_nothing_reaches_is_refused() -> None:
    limits = replace(LIMITS, num_examples=40, seconds=50.0)
    with pytest.raises(InvalidArgument, match=r"^target_epsilon=1e-06: no batch reaches it in that time"):
        candidates(limits, 1e-6)
    assert kept(quietest(limits, 8, 1e-6), RULE) == 0


def test_so_many_rows_keep_half_of_the_gain() -> None:
    config, rule = quietest(LIMITS, 128, 0.5), replace(RULE, noise=500.0)
    assert config is not None
    assert kept(config, rule) < ENOUGH, "too few rows"
    needed = examples_needed(config, rule, 0.5)
    assert needed is not None
    work = Work(batch=128, steps=config.steps, delta=1e-5, noise_bands=config.noise_bands)
    for rows, enough in ((needed, True), (needed // 2, False)):
        sigma = work.noise(rows, 0.5)
        assert sigma is not None
        ratio = noise_batch_ratio(config) * sigma / config.noise_multiplier
        assert (rule.kept(config.steps, ratio) >= 0.98 * ENOUGH) is enough
    assert examples_needed(config, replace(rule, noise=1e12), 0.5) is None
