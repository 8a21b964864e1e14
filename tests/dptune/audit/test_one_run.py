"""p-values of one run: never below the exact probabilities where those are known, and equal to them at the edge."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from dptune import InvalidArgument
from dptune.audit.one_run import (
    Score,
    curve_of,
    epsilon_of,
    gaussian,
    judge,
    mu_of,
    p_value,
    p_value_of_curve,
)

SIZES = [(1, 1), (4, 3), (10, 8), (10, 10), (60, 45), (200, 150)]


@pytest.mark.parametrize(("guesses", "right"), SIZES)
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_without_delta_the_p_value_is_that_of_randomised_response(guesses: int, right: int, epsilon: float) -> None:
    accuracy = math.exp(epsilon) / (1 + math.exp(epsilon))
    exact = sum(
        math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(right, guesses + 1)
    )
    assert p_value(Score(guesses, guesses, right), epsilon, 0.0) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("canaries", [2, 6, 9])
@pytest.mark.parametrize("delta", [0.01, 0.2])
def test_delta_covers_a_mechanism_that_gives_all_coins_away_with_that_probability(canaries: int, delta: float) -> None:
    """It tells all coins with probability delta, and otherwise answers by randomised response."""
    accuracy = math.e / (1 + math.e)
    for right in range(canaries + 1):
        exact = delta + (1 - delta) * binom.sf(right - 1, canaries, accuracy)
        assert p_value(Score(canaries, canaries, right), 1.0, delta) >= exact - 1e-12


def test_delta_enters_by_the_worst_share() -> None:
    score, accuracy = Score(7, 5, 4), 1 / (1 + math.exp(-1))
    masses = binom.pmf(np.arange(6), 5, accuracy)
    worst = max(masses[4 - i : 4].sum() / i for i in range(1, 5))
    assert p_value(score, 1.0, 0.003) == pytest.approx(masses[4:].sum() + 2 * 7 * 0.003 * worst)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_one_guess_about_one_coin_is_right_as_often_as_the_trade_off_allows(mu: float) -> None:
    assert p_value_of_curve(Score(1, 1, 1), gaussian(mu)) == pytest.approx(norm.cdf(mu / 2), rel=1e-6)


@pytest.mark.parametrize(("guesses", "right"), SIZES)
@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_independent_gaussian_guesses_are_never_less_probable_than_the_bound(
    guesses: int, right: int, mu: float
) -> None:
    exact = binom.sf(right - 1, guesses, norm.cdf(mu / 2))
    assert p_value_of_curve(Score(guesses, guesses, right), gaussian(mu)) >= exact * (1 - 1e-6)


def test_guesses_about_the_clearest_coins_stay_below_the_bound_too() -> None:
    """Exact for two independent Gaussian coins of which the clearer one is guessed, by a sum over a grid."""
    mu, grid = 1.0, np.linspace(-8, 9, 1200)
    inside, outside = (norm.pdf(grid, centre) * (grid[1] - grid[0]) for centre in (mu, 0.0))
    clear = np.abs(grid - mu / 2)
    right = 0.0
    for coins in itertools.product((True, False), repeat=2):
        first, second = (inside if coin else outside for coin in coins)
        guessed = (grid > mu / 2) == np.array(coins)[:, None]
        clearer = clear[:, None] > clear[None, :]
        right += 0.25 * float((np.outer(first, second) * np.where(clearer, guessed[0][:, None], guessed[1])).sum())
    assert 0.7 < right < 0.85
    assert p_value_of_curve(Score(2, 1, 1), gaussian(mu)) >= right - 1e-3


def test_a_curve_of_one_pair_is_its_trade_off_function() -> None:
    blown = curve_of([(1.0, 0.01)])
    for error in np.linspace(0, 1, 23):
        power = max(0.0, 1 - 0.01 - math.e * error, (1 - 0.01 - error) / math.e)  # 1 - f(x) at x = error
        least = blown(1 - power)
        assert least <= error + 1e-12
        assert error == pytest.approx(least) or power == 0 or 1 - power <= 0.01 + 1e-12


def test_a_curve_of_many_pairs_comes_near_the_gaussian_that_they_describe() -> None:
    mu, epsilons = 1.0, np.linspace(0, 8, 60)
    deltas = norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * norm.cdf(-mu / 2 - epsilons / mu)
    score = Score(40, 40, 34)
    by_pairs = p_value_of_curve(score, curve_of(zip(epsilons, deltas, strict=True)))
    exact = p_value_of_curve(score, gaussian(mu))
    assert exact <= by_pairs * (1 + 1e-9)
    assert by_pairs < 1.1 * exact


def test_bounds_invert_the_p_values() -> None:
    score = Score(300, 100, 92)
    epsilon, mu = epsilon_of(score, delta=1e-6, alpha=0.05), mu_of(score, alpha=0.05)
    assert p_value(score, epsilon, 1e-6) == pytest.approx(0.05, rel=1e-2)
    assert p_value_of_curve(score, gaussian(mu)) == pytest.approx(0.05, rel=1e-2)
    assert epsilon_of(Score(300, 100, 50), delta=1e-6, alpha=0.05) == mu_of(Score(300, 100, 50), alpha=0.05) == 0
    assert mu_of(Score(300, 100, 0), alpha=0.05) == 0
    assert p_value(Score(3, 3, 0), 1.0, 0.1) == p_value_of_curve(Score(3, 3, 0), gaussian(1.0)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_guesses_of_a_gaussian_mechanism_do_not_contradict_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    included = generator.integers(0, 2, 1000).astype(bool)
    scores = included + generator.normal(size=1000)  # mu = 1
    for guesses in (1000, 200):
        assert 0 < mu_of(judge(scores, included, guesses), alpha=0.05) < 1


def test_the_highest_scores_are_guessed_to_be_in() -> None:
    scores, included = np.array([5.0, -3.0, 0.1, 4.0, -9.0, 0.0]), np.array([True, True, False, False, False, True])
    assert judge(scores, included, 2) == Score(6, 2, 2)
    assert judge(scores, included, 4) == Score(6, 4, 2)
    for guesses in (3, 0, 8):
        with pytest.raises(InvalidArgument, match=f"guesses={guesses}: must be even"):
            judge(scores, included, guesses)
    with pytest.raises(InvalidArgument, match="included=2: there are 6 scores"):
        judge(scores, included[:2], 2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="right=5: there are 4 guesses about 9 canaries"):
        p_value(Score(9, 4, 5), 1.0, 0.0)
    with pytest.raises(InvalidArgument, match="stated=0: give at least one epsilon"):
        curve_of([])
