"""Lower bounds hold where the truth is known, come near it, and agree with direct sums of probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from dptune import InvalidArgument
from dptune.audit.bounds import (
    Guesses,
    clopper_pearson,
    epsilon_bound,
    epsilon_of_mu,
    likelihood_ratios,
    mu_bound,
    unlikely_normal,
)

DELTA = 1e-5


def gaussian_games(mu: float, count: int, seed: int) -> Guesses:
    generator = np.random.default_rng(seed)
    member = generator.integers(0, 2, count).astype(bool)
    return Guesses(generator.normal(size=count) + mu * member, member)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (7, 400), (0, 0)])
def test_clopper_pearson_solves_the_binomial_tails(hits: int, trials: int) -> None:
    lower, upper = (float(bound) for bound in clopper_pearson(hits, trials, 0.01))
    if hits:
        assert binom.sf(hits - 1, trials, lower) == pytest.approx(0.01, rel=1e-6)
    else:
        assert lower == 0
    if hits < trials:
        assert binom.cdf(hits, trials, upper) == pytest.approx(0.01, rel=1e-6)
    else:
        assert upper == 1


@pytest.mark.parametrize("truth", [0.01, 0.3, 0.5, 0.97])
def test_a_bound_fails_no_more_often_than_stated_counted_over_all_outcomes(truth: float) -> None:
    outcomes = np.arange(31)
    lower, upper = clopper_pearson(outcomes, 30, 0.05)
    masses = binom.pmf(outcomes, 30, truth)
    assert masses[lower > truth].sum() <= 0.05
    assert masses[upper < truth].sum() <= 0.05
    assert masses[(lower > truth) | (upper < truth)].sum() > 0, "bounds that never fail say nothing"


def test_epsilon_of_randomised_response_is_found_from_below() -> None:
    generator = np.random.default_rng(1)
    member = generator.integers(0, 2, 40_000).astype(bool)
    answers = Guesses(np.where(generator.random(40_000) < 0.75, member, ~member).astype(float), member)
    halves = Guesses(*(part[:20_000] for part in answers)), Guesses(*(part[20_000:] for part in answers))
    bound = epsilon_bound(*halves, delta=DELTA, alpha=1e-3)
    assert 0.9 * math.log(3) < bound.value < math.log(3)
    assert bound.games == 20_000


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_bounds_of_a_gaussian_mechanism_are_below_and_near_the_truth(mu: float, seed: int) -> None:
    choose, judge = gaussian_games(mu, 10_000, seed), gaussian_games(mu, 10_000, 100 + seed)
    assert 0.6 * mu < mu_bound(choose, judge, alpha=1e-4).value < mu
    assert epsilon_bound(choose, judge, delta=DELTA, alpha=1e-4).value < epsilon_of_mu(mu, DELTA)
    assert mu_bound(choose, judge, alpha=0.4).value > mu_bound(choose, judge, alpha=1e-6).value


def test_both_guesses_are_tried() -> None:
    """Units that are in the data show only by a score that is never low: the guess "out" tells more."""
    generator = np.random.default_rng(3)
    member = np.arange(20_000) % 2 == 0
    scores = np.where(member, 1.0, generator.integers(0, 2, 20_000))
    games = Guesses(scores, member)
    assert epsilon_bound(games, games, delta=DELTA, alpha=1e-3).value > 5


def test_epsilon_of_mu_is_that_of_the_gaussian_mechanism() -> None:
    epsilon = epsilon_of_mu(1.5, DELTA)
    delta = norm.cdf(0.75 - epsilon / 1.5) - math.exp(epsilon) * norm.cdf(-0.75 - epsilon / 1.5)
    assert delta == pytest.approx(DELTA, rel=1e-6)
    assert epsilon_of_mu(0.0, DELTA) == 0


@pytest.mark.parametrize(("q", "group_size"), [(1.0, 1), (0.2, 1), (0.2, 3), (1.0, 3)])
def test_likelihood_ratios_are_those_of_the_densities(q: float, group_size: int) -> None:
    observed, sigma = np.linspace(-4, 6, 12).reshape(3, 4), 0.7
    found = likelihood_ratios(observed, noise_multiplier=sigma, sampling_probability=q, group_size=group_size)
    shares = [math.comb(group_size, j) * q**j * (1 - q) ** (group_size - j) for j in range(group_size + 1)]
    present = sum(share * norm.pdf(observed, j, sigma) for j, share in enumerate(shares))
    assert found == pytest.approx(np.log(present / norm.pdf(observed, 0, sigma)), rel=1e-9)


def test_games_of_one_kind_are_refused() -> None:
    games = Guesses(np.zeros(3), np.ones(3, dtype=bool))
    with pytest.raises(InvalidArgument, match="games=3: some need"):
        mu_bound(games, games, alpha=0.1)


def test_unlikely_values() -> None:
    assert norm.sf(unlikely_normal(1e-6)) == pytest.approx(1e-6)
    assert unlikely_normal(1.0) == -math.inf


def test_the_games_that_choose_do_not_judge() -> None:
    member = np.arange(2000) % 2 == 0
    clear, blind = Guesses(member.astype(float), member), Guesses(np.zeros(2000), member)
    assert epsilon_bound(clear, clear, delta=DELTA, alpha=1e-3).value > 3
    assert epsilon_bound(clear, blind, delta=DELTA, alpha=1e-3).value == 0
    assert mu_bound(clear, clear, alpha=1e-3).value > 3
    assert mu_bound(clear, blind, alpha=1e-3).value == 0
