"""Epsilon of draws that are cut at a maximal batch: against all draws counted, real draws, and the library's own."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution

from dptune import InvalidArgument, PoissonSampler
from dptune.accounting import (
    Cut,
    Spend,
    account,
    compose,
    epsilon,
    max_steps,
    noise_multiplier,
    running_epsilon,
)
from dptune.accounting.bounds import gaussian_epsilon, renyi_epsilon
from dptune.accounting.distributions import one_step
from dptune.accounting.selection import PrivateSelection
from dptune.keystream import Keystream
from tests.dptune.accounting.cut_steps import hockey_stick, sums_of_draws

DELTA = 1e-6
EPSILONS = (-1.0, -0.3, 0.0, 0.2, 0.5, 1.0, 2.0, 3.0)
# The gradients of the others, in clip norms along the one added, whose gradient is 1.
OTHERS = ([-1.0] * 4, [-1.0, -1.0, 1.0, 1.0], [0.0] * 4, [-1.0] * 5, [-0.5, -1.0, 0.5])
CASES = [
    (others, q, most, sigma)
    for others in OTHERS
    for q, most, sigma in ((0.9, 4, 1.0), (0.5, 2, 1.0), (1.0, 3, 2.0), (0.2, 1, 0.7), (0.7, 5, 1.5))
]


@pytest.mark.parametrize("data_set", ["with it", "without it"])
@pytest.mark.parametrize(("others", "q", "most", "sigma"), CASES)
def test_no_step_loses_more_than_is_accounted_in_either_direction(
    others: list[float], q: float, most: int, sigma: float, data_set: str
) -> None:
    """The size that is stated is that of the data set, whether the example is removed from it or added to it."""
    size = len(others) + (data_set == "with it")
    step = one_step(Spend(sigma, q, 1, 1, Cut(most, size)), 1e-3)
    within, without = sums_of_draws([*others, 1.0], q, most), sums_of_draws(others, q, most)
    for eps in EPSILONS:
        assert hockey_stick(within, without, sigma, eps) <= step._pmf_remove.get_delta_for_epsilon(eps) + 1e-7
        assert hockey_stick(without, within, sigma, eps) <= step._pmf_add.get_delta_for_epsilon(eps) + 1e-7


@pytest.mark.parametrize(("q", "most"), [(0.9, 4), (1.0, 4), (0.5, 2), (0.95, 3)])
def test_plain_poisson_accounting_is_too_small_for_cut_draws(q: float, most: int) -> None:
    """So the cut must be accounted for; with sensitivities that are twice as large only where a draw is cut."""
    within, without = sums_of_draws([-1.0] * 4 + [1.0], q, most), sums_of_draws([-1.0] * 4, q, most)
    plain = one_step(Spend(1.0, q, 1), 1e-3)
    assert hockey_stick(within, without, 1.0, 0.5) > 1.1 * plain._pmf_remove.get_delta_for_epsilon(0.5)


def test_real_draws_with_noise_stay_within_what_is_accounted() -> None:
    """Three steps of the sampler, 4,000 times with and without an example: epsilon bounds how often a sum is large.

    Plain Poisson accounting does not: at a delta of 0.2 it misses by 0.15.
    """
    q, most, steps, sigma, trials, threshold = 0.95, 5, 3, 2.0, 4000, -10.75
    chance, others = np.random.default_rng(0), np.full(5, -1.0)

    def share_of_large_sums(gradients: np.ndarray) -> float:
        keystream = Keystream.for_tests(f"{len(gradients)} examples")
        sampler = PoissonSampler(len(gradients), q, keystream, max_batch=most)
        sums = np.array([gradients[sampler.draw()].sum() for _ in range(trials * steps)])
        noise = sigma * chance.normal(size=(trials, steps))
        return float(((sums.reshape(trials, steps) + noise).sum(1) > threshold).mean())

    within, without = share_of_large_sums(np.append(others, 1.0)), share_of_large_sums(others)
    plain, cut = Spend(sigma, q, steps), Spend(sigma, q, steps, 1, Cut(most, len(others)))
    error = 0.05  # four standard deviations
    for delta in (0.01, 0.05, 0.2):
        assert within - math.exp(compose([cut], delta=delta)) * without <= delta + error
    assert within - math.exp(compose([plain], delta=0.2)) * without > 0.2 + error


@pytest.mark.parametrize(("n", "q"), [(400, 0.1), (400, 0.0313), (37, 0.7), (5, 1.0)])
def test_the_probability_of_a_full_batch_is_the_exact_one_rounded_up(n: int, q: float) -> None:
    """Among as many others as the data set has examples, at least N are drawn."""
    share = Fraction(q)
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    for most in {1, math.ceil(n * q), math.ceil(n * q + 3 * math.sqrt(n * q)), n} - {0}:
        exact = sum(chances[most:])
        assert (
            exact
            <= Fraction(Cut(most, n).full_probability(q))
            <= exact * Fraction(1000002, 1000000) + Fraction(2, 10**30)
        )


@pytest.mark.parametrize("most", [1, 3, 10, 40])
def test_the_probability_is_as_exact_for_a_large_data_set(most: int) -> None:
    n, q = 10**8, 3e-8
    chance, tail = math.exp(n * math.log1p(-q)), 0.0
    for k in range(200):
        tail += chance if k >= most else 0.0
        chance *= (n - k) / (k + 1) * q / (1 - q)
    assert tail < Cut(most, n).full_probability(q) < tail * (1 + 2e-6) + 2e-30


SETTINGS = [(67349, 1024, 198, 1.0), (10000, 200, 500, 1.0), (1000, 50, 100, 2.0)]


@pytest.mark.parametrize(("n", "batch", "steps", "sigma"), SETTINGS)
def test_a_smaller_maximum_costs_more_and_a_large_one_nothing(n: int, batch: int, steps: int, sigma: float) -> None:
    q = batch / n
    spread = math.sqrt(batch * (1 - q))
    limits = [n + 1, n, *(math.ceil(batch + times * spread) for times in (8, 4, 3, 2, 1))]
    plain = compose([Spend(sigma, q, steps)], delta=DELTA, interval=1e-3)
    costs = [compose([Spend(sigma, q, steps, 1, Cut(most, n))], delta=DELTA, interval=1e-3) for most in limits]
    assert costs[0] == plain
    assert all(less <= more * (1 + 1e-7) for less, more in pairwise(costs))
    assert costs[2] < plain * (1 + 1e-5)
    assert costs[-1] > 1.5 * plain
    twice = compose([Spend(sigma / 2, q, steps)], delta=DELTA, interval=1e-3)
    assert costs[-1] < twice


@pytest.mark.parametrize(("n", "batch", "steps", "sigma"), SETTINGS)
def test_it_is_as_small_as_the_librarys_bound_on_the_same_draws(n: int, batch: int, steps: int, sigma: float) -> None:
    q = batch / n
    most = math.ceil(batch + 2 * math.sqrt(batch))
    step = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=n + 1,
        sampling_probability=q,
        truncated_batch_size=most,
        noise_multiplier=sigma,
        value_discretization_interval=1e-3,
    )
    theirs = step.self_compose(steps).get_epsilon_for_delta(DELTA)
    ours = compose([Spend(sigma, q, steps, 1, Cut(most, n))], delta=DELTA, interval=1e-3)
    assert 0.9 * theirs < ours < 1.005 * theirs


@pytest.mark.parametrize("delta", [1e-5, 1e-8, 1e-12, 1e-16])
def test_every_accountant_stays_above_the_distributions(delta: float) -> None:
    """Renyi accounting and the closed form take over at tiny deltas, so they must cover the cut too."""
    cut = Spend(1.0, 0.02, 50, 1, Cut(30, 1000))
    finest = compose([cut], delta=max(delta, 1e-12))
    assert renyi_epsilon([cut], delta) >= finest
    assert gaussian_epsilon([cut], delta) >= finest
    assert account([cut], delta=delta).epsilon > account([cut._replace(cut=None)], delta=delta).epsilon


def test_renyi_accounting_of_one_step_bounds_all_draws_counted() -> None:
    q, most, sigma = 0.9, 4, 2.0
    within, without = sums_of_draws([-1.0] * 4 + [1.0], q, most), sums_of_draws([-1.0] * 4, q, most)
    spend = Spend(sigma, q, 1, 1, Cut(most, 5))
    for delta in (0.1, 1e-3, 1e-5):
        for bound in (renyi_epsilon([spend], delta), gaussian_epsilon([spend], delta)):
            assert hockey_stick(within, without, sigma, bound) <= delta
            assert hockey_stick(without, within, sigma, bound) <= delta


def test_draws_of_all_examples_are_cut_too() -> None:
    """With q = 1 a full batch always gives one example's place to the added one: twice the sensitivity."""
    twice = compose([Spend(1.0, 1.0, 3)], delta=DELTA)
    assert compose([Spend(2.0, 1.0, 3, 1, Cut(4, 9))], delta=DELTA) == pytest.approx(twice, rel=1e-9)


def test_searches_keep_their_promise() -> None:
    setting: dict[str, Any] = {"sampling_probability": 0.02, "delta": DELTA, "cut": Cut(34, 1000)}
    sigma = noise_multiplier(target_epsilon=3.0, steps=60, **setting)
    assert epsilon(noise_multiplier=sigma, steps=60, **setting) <= 3.0
    assert epsilon(noise_multiplier=0.995 * sigma, steps=60, **setting) > 3.0
    most = max_steps(target_epsilon=3.0, noise_multiplier=sigma, at_least=60, **setting)
    assert epsilon(noise_multiplier=sigma, steps=most, **setting) <= 3.0
    assert epsilon(noise_multiplier=sigma, steps=most + 1, **setting) > 3.0
    spend = Spend(sigma, 0.02, 60, 1, setting["cut"])
    assert running_epsilon([spend], delta=DELTA) >= compose([spend], delta=DELTA)


def test_plain_and_cut_steps_compose() -> None:
    plain, cut = Spend(1.2, 0.02, 50), Spend(1.2, 0.02, 50, 1, Cut(28, 1000))
    together = compose([plain, cut], delta=DELTA)
    alone = [compose([spend], delta=DELTA) for spend in (plain, cut)]
    assert max(alone) < together < sum(alone)
    assert together < compose([cut._replace(steps=100)], delta=DELTA)


@pytest.mark.parametrize(
    ("spend", "message"),
    [
        (Spend(1.0, 0.1, 3, 4, Cut(9, 90)), "max_batch=9: draws of units with up to 4 examples cannot be cut"),
        (Spend(1.0, 0.1, 3, 1, Cut(0, 90)), "max_batch=0: "),
        (Spend(1.0, 0.1, 3, 1, Cut(9, 0)), "num_examples=0: "),
    ],
)
def test_cuts_whose_cost_is_not_known_are_refused(spend: Spend, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        compose([spend], delta=DELTA)


def test_private_selection_of_cut_draws_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^max_batch=9: private selection accounts for plain Poisson draws"):
        PrivateSelection("geometric", 3, 10.0).training_epsilon(Spend(1.0, 0.1, 3, 1, Cut(9, 90)), DELTA)
