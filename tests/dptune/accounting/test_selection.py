"""Private selection: the distribution of trials, its epsilon, and what breaks its bound."""

from __future__ import annotations

import logging
import math
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from dptune._validate import InvalidArgument
from dptune.accounting import Spend, epsilon
from dptune.accounting.selection import DISTRIBUTIONS, GEOMETRIC, POISSON, DrawnTrial, PrivateSelection, best_of
from dptune.keystream import Keystream

SPEND, DELTA = Spend(1.2, 0.02, 200), 1e-6
DRAWS = 3000


def draws(selection: PrivateSelection, candidates: int = 6, seed: object = 0) -> list[list[DrawnTrial]]:
    stream = Keystream.for_tests(f"{selection} {seed}")
    return [selection.draw_trials(candidates, stream) for _ in range(DRAWS)]


@pytest.mark.parametrize("mean", [1.0, 3.5, 20.0])
@pytest.mark.parametrize(
    ("name", "expected"), [(POISSON, stats.poisson), (GEOMETRIC, lambda mean: stats.geom(1 / mean))]
)
def test_the_number_of_trials_has_the_distribution_that_is_accounted_for(name: str, expected: Any, mean: float) -> None:
    numbers = [len(trials) for trials in draws(PrivateSelection(name, mean, 1.0))]
    if mean == 1 and name == GEOMETRIC:
        assert set(numbers) == {1}
        return
    law = expected(mean)
    edges = sorted({int(law.ppf(share)) for share in np.linspace(0.05, 0.95, 12)})
    cells = [-1, *edges, 10**9]
    seen = np.histogram(numbers, bins=np.array(cells) + 0.5)[0]
    wanted = np.array([law.cdf(high) - law.cdf(low) for low, high in pairwise(cells)]) * DRAWS
    kept = wanted > 0
    assert seen[~kept].sum() == 0
    assert stats.chisquare(seen[kept], wanted[kept]).pvalue > 1e-4
    assert (min(numbers) == 0) == (name == POISSON and mean < 10)


def test_candidates_are_uniform_and_independent_of_how_many_there_are() -> None:
    runs = [trials for trials in draws(PrivateSelection(GEOMETRIC, 4.0, 1.0)) if trials]
    firsts, lasts = (Counter(trials[place].candidate for trials in runs) for place in (0, -1))
    for counts in (firsts, lasts):
        assert sorted(counts) == list(range(6))
        assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    long = Counter(trials[0].candidate for trials in runs if len(trials) > 4)
    assert stats.chisquare(list(long.values())).pvalue > 1e-4
    pairs = Counter((trials[0].candidate, trials[1].candidate) for trials in runs if len(trials) > 1)
    assert len(pairs) == 36
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-4


def test_scores_get_gaussian_noise_of_the_stated_size() -> None:
    noises = [trial.score_noise for trials in draws(PrivateSelection(POISSON, 3.0, 5.0)) for trial in trials]
    assert len(noises) > 8_000
    assert stats.kstest(noises, stats.norm(scale=5.0).cdf).pvalue > 1e-4
    assert abs(np.corrcoef(noises[:-1], noises[1:])[0, 1]) < 5 / len(noises) ** 0.5


def test_no_seed_reaches_the_draw() -> None:
    drawn = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        drawn.append(PrivateSelection(POISSON, 200.0, 1.0).draw_trials(1000))
    assert drawn[0] != drawn[1]
    assert not {trial.score_noise for trial in drawn[0]} & {trial.score_noise for trial in drawn[1]}


@pytest.mark.parametrize("word", [0, (1 << 53) - 1])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_ends_of_the_uniform_give_whole_trials(name: str, word: int) -> None:
    class Ends(Keystream):
        def words(self, count: int, *, scratch: bytearray | None = None) -> np.ndarray:
            del scratch
            return np.full(count, word, dtype=np.uint64)

    trials = PrivateSelection(name, 2.0, 1.0).draw_trials(3, Ends.for_tests(0))
    assert 0 <= len(trials) < 200
    assert all(trial.candidate in range(3) and math.isfinite(trial.score_noise) for trial in trials)


def by_hand(event: Any, name: str, mean: float) -> float:
    accountant = RdpAccountant()
    accountant.compose(RepeatAndSelectDpEvent(event, mean, {POISSON: math.inf, GEOMETRIC: 1}[name]))
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("noise", [0.8, 100.0])
def test_epsilon_is_that_of_whoever_is_worse_off(name: str, noise: float) -> None:
    selection = PrivateSelection(name, 8.0, noise)
    training = SelfComposedDpEvent(PoissonSampledDpEvent(0.02, GaussianDpEvent(1.2)), 200)
    both = [by_hand(event, name, 8.0) for event in (training, GaussianDpEvent(noise))]
    found = [selection.training_epsilon(SPEND, DELTA), selection.validation_epsilon(DELTA)]
    assert all(raw < raised < raw + 1e-8 for raw, raised in zip(both, found, strict=True))  # raised above rounding
    assert selection.epsilon(SPEND, DELTA) == max(found)
    assert (both[1] > both[0]) == (noise == 0.8)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_bound_is_above_what_a_selection_really_costs(name: str) -> None:
    """Two neighbours by simulation: the share of winners in an event, with and without one validation record.

    Both candidates have 10 right answers; with the record, candidate 0 has one more.
    """
    sigma, mean, count = 1.0, 6.0, 200_000
    bound = PrivateSelection(name, mean, sigma).validation_epsilon(1e-3)
    generator = np.random.default_rng(0)
    law = stats.poisson(mean) if name == POISSON else stats.geom(1 / mean)
    numbers = law.rvs(count, random_state=generator)
    owner = np.repeat(np.arange(count), numbers)
    candidates, noise = generator.integers(0, 2, len(owner)), sigma * generator.standard_normal(len(owner))

    def shares(extra: float) -> np.ndarray:
        best = np.full(count, -np.inf)
        np.maximum.at(best, owner, 10 + noise + extra * (candidates == 0))
        return np.array([(best > level).mean() for level in np.arange(9, 15, 0.5)])

    with_record, without = shares(1.0), shares(0.0)
    assert (with_record <= math.exp(bound) * without + 1e-3).all()
    assert (with_record / without).max() > 1.2  # the record has an effect


def test_costs_grow_with_the_mean_and_shrink_with_noise() -> None:
    for name in DISTRIBUTIONS:
        spent = [PrivateSelection(name, mean, 5.0).epsilon(SPEND, DELTA) for mean in (1, 2, 10, 100)]
        assert spent == sorted(set(spent))
        assert PrivateSelection(name, 10, 5.0).epsilon(SPEND._replace(noise_multiplier=1.5), DELTA) < spent[2]
        assert PrivateSelection(name, 10, 5.0).epsilon(SPEND, 1e-8) > spent[2]


def test_a_selection_costs_more_than_a_run_and_less_than_the_best_of_many() -> None:
    cost = PrivateSelection(POISSON, 20, 5.0).cost(SPEND, DELTA)
    assert cost.runs == 20
    alone = epsilon(noise_multiplier=1.2, sampling_probability=0.02, steps=200, delta=DELTA)
    together = epsilon(noise_multiplier=1.2, sampling_probability=0.02, steps=4000, delta=DELTA)
    assert (cost.one_run, cost.best_of) == (alone, together)
    assert cost.one_run < cost.selection < cost.best_of
    assert PrivateSelection(POISSON, 20, 5.0).cost(SPEND, DELTA, runs=1).best_of == alone


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("target", "mean"), [(8.0, 10), (2.0, 3)])
def test_the_noise_found_keeps_the_promise_and_is_the_smallest_that_does(name: str, target: float, mean: float) -> None:
    selection = PrivateSelection(name, mean, 20.0)
    sigma = selection.noise_multiplier(target_epsilon=target, delta=DELTA, sampling_probability=0.02, steps=100)
    spend = Spend(sigma, 0.02, 100)
    assert selection.epsilon(spend, DELTA) <= target
    assert selection.epsilon(spend._replace(noise_multiplier=sigma * 0.999), DELTA) > target
    assert epsilon(noise_multiplier=sigma, sampling_probability=0.02, steps=100, delta=DELTA) < 0.9 * target


def test_noise_is_found_where_a_large_delta_makes_epsilon_zero() -> None:
    selection = PrivateSelection(GEOMETRIC, 1.0, 20.0)
    assert selection.training_epsilon(Spend(1e4, 0.3, 3), 1e-3) == 0
    sigma = selection.noise_multiplier(target_epsilon=8.0, delta=1e-3, sampling_probability=0.3, steps=3)
    assert 0.9 * 8 < selection.training_epsilon(Spend(sigma, 0.3, 3), 1e-3) <= 8


def test_nothing_is_drawn_as_often_as_is_said() -> None:
    selection = PrivateSelection(POISSON, 2.0, 1.0)
    assert selection.chance_of_nothing == pytest.approx(math.exp(-2))
    assert PrivateSelection(GEOMETRIC, 2.0, 1.0).chance_of_nothing == 0
    share = np.mean([not trials for trials in draws(selection)])
    assert abs(share - math.exp(-2)) < 5 * (math.exp(-2) / DRAWS) ** 0.5


def test_the_noisy_score_decides() -> None:
    trials = [DrawnTrial(4, -3.0), DrawnTrial(1, 0.5), DrawnTrial(4, 0.0)]
    assert best_of([100, 98, 98], trials) == (1, 98.5)
    assert best_of([100, 98, 98], [trial._replace(score_noise=0.0) for trial in trials]) == (0, 100)
    assert best_of([], []) is None
    with pytest.raises(ValueError, match="longer"):
        best_of([1.0], trials)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"validation_noise": 0.0}, "validation_noise=0.0: give a finite number above 0"),
        ({"validation_noise": math.inf}, "validation_noise=inf: "),
        ({"mean_trials": 0.5}, "mean_trials=0.5: give a finite number of at least 1"),
        ({"mean_trials": math.nan}, "mean_trials=nan: "),
        ({"distribution": "uniform"}, "distribution='uniform': give one of poisson, geometric"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PrivateSelection(**({"distribution": POISSON, "mean_trials": 5, "validation_noise": 2.0} | changed))
    assert str(caught.value).startswith(named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"target_epsilon": 1e-4}, "validation_noise=5.0: the scores alone cost epsilon"),
        ({"target_epsilon": 0.0}, "target_epsilon=0.0: "),
        ({"target_epsilon": 1e7}, "target_epsilon=10000000.0: out of reach: so large"),
        ({"steps": 10**9, "sampling_probability": 1.0}, "target_epsilon=3.0: out of reach: lower mean_trials"),
        ({"steps": 0}, "steps=0: "),
        ({"delta": 1.0}, "delta=1.0: "),
        ({"sampling_probability": 0.0}, "sampling_probability=0.0: "),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(changed: dict[str, Any], named: str) -> None:
    setting = {"target_epsilon": 3.0, "delta": DELTA, "sampling_probability": 0.02, "steps": 100}
    with pytest.raises(InvalidArgument) as caught:
        PrivateSelection(GEOMETRIC, 5, 5.0).noise_multiplier(**(setting | changed))
    assert str(caught.value).startswith(named)


def test_little_noise_is_accounted_for_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """dp-accounting skips orders whose series diverges, and logs a warning for each."""
    spend = Spend(0.43, 0.2, 2)
    expected = by_hand(SelfComposedDpEvent(PoissonSampledDpEvent(0.2, GaussianDpEvent(0.43)), 2), POISSON, 2)
    assert "failed to converge" in caplog.text
    caplog.clear()
    assert PrivateSelection(POISSON, 2, 5.0).training_epsilon(spend, DELTA) == pytest.approx(expected, rel=1e-9)
    assert caplog.text == ""
    assert logging.getLogger("absl").isEnabledFor(logging.WARNING)


def test_groups_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="group_size=3: private selection accounts for single examples only"):
        PrivateSelection(GEOMETRIC, 5, 5.0).epsilon(SPEND._replace(group_size=3), DELTA)


def test_the_score_noise_that_the_page_names_is_the_least_to_a_tenth() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how_to" / "choosing.md").read_text()
    rows = [list(map(float, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)]
    assert len(rows) == 3
    for target, mean, *noises in rows:
        for name, noise in zip((POISSON, GEOMETRIC), noises, strict=True):
            assert PrivateSelection(name, mean, noise).validation_epsilon(1e-6) <= target
            assert PrivateSelection(name, mean, noise - 0.1).validation_epsilon(1e-6) > target
