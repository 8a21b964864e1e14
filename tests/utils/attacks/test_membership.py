"""Scores, areas, rates and intervals agree with what is computed one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from utils.attacks.membership import (
    FALSE_ALARMS,
    LOSS,
    MIN_K,
    REFERENCE,
    START,
    SURE,
    attack,
    caught_at,
    exact_interval,
    least_likely,
    mean_of_authors,
    membership_scores,
    roc,
)


def test_scores_are_of_each_row() -> None:
    trained = [np.array([1.0, 2.0, 6.0, 3.0, 8.0]), np.array([0.5])]
    start = [np.array([4.0, 4.0, 4.0, 4.0, 4.0]), np.array([2.0])]
    found = membership_scores(trained, start, 40)
    assert found[LOSS].tolist() == [-4, -0.5]
    assert found[REFERENCE].tolist() == [0, 1.5]
    assert found[MIN_K].tolist() == [-7, -0.5], "two of five tokens, and at least one"
    assert found[START].tolist() == [-4, -2]


@pytest.mark.parametrize(("percent", "tokens"), [(1, 1), (20, 2), (39, 3), (100, 10)])
def test_the_least_likely_tokens_are_the_largest_losses(percent: float, tokens: int) -> None:
    losses = np.random.default_rng(0).permutation(np.arange(10.0))
    assert least_likely(losses, percent) == -np.mean([9 - i for i in range(tokens)])


def test_the_area_counts_pairs() -> None:
    generator = np.random.default_rng(1)
    members, others = generator.integers(0, 6, 30).astype(float), generator.integers(0, 5, 40).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    assert attack(members, others).auc == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("digits", [1, 8])
def test_a_threshold_catches_the_most_at_its_false_alarms(digits: int) -> None:
    """Rounded scores have ties."""
    generator = np.random.default_rng(2)
    members, others = (generator.normal(mean, size=300).round(digits) for mean in (1, 0))
    for rate in (0.01, 0.1):
        allowed = [t for t in (*others, *members, -math.inf) if np.mean(others > t) <= rate]
        found = caught_at(members, others, rate)
        assert found is not None
        assert found.share == max(np.mean(members > t) for t in allowed)
        assert found.low < found.share < found.high


@pytest.mark.parametrize(("others", "enough"), [(999, False), (1000, True)])
def test_a_rate_needs_as_many_held_out_rows(others: int, enough: bool) -> None:
    found = attack(np.arange(5.0), np.arange(float(others)))
    assert [one is not None for one in found.caught] == [True, enough]
    assert FALSE_ALARMS == (0.01, 0.001)


@pytest.mark.parametrize(("count", "total"), [(0, 20), (3, 20), (20, 20)])
def test_the_interval_is_that_of_clopper_and_pearson(count: int, total: int) -> None:
    """At its ends, so many successes or more (or fewer) have a chance of one half of 5%."""
    low, high = exact_interval(count, total, 0.95)

    def chance(probability: float, counts: range) -> float:
        return sum(math.comb(total, k) * probability**k * (1 - probability) ** (total - k) for k in counts)

    assert low == 0 if count == 0 else chance(low, range(count, total + 1)) == pytest.approx(0.025)
    assert high == 1 if count == total else chance(high, range(count + 1)) == pytest.approx(0.025)


def test_false_alarms_of_a_threshold_are_rarely_above_their_limit() -> None:
    """For uniform scores the share above a threshold is one minus it."""
    generator = np.random.default_rng(3)
    found = caught_at(np.zeros(5), generator.random(200), 0.02)
    assert found is not None
    shares = 1 - np.sort(generator.random((4000, 200)))[:, -5]
    assert np.mean(shares > found.sure_alarms) < 4 * (1 - SURE)
    assert np.mean(shares > 0.6 * found.sure_alarms) > 0.005, "the limit is not far off"


def test_a_better_attack_beats_guessing_and_noise_does_not() -> None:
    generator = np.random.default_rng(4)
    members, others = generator.normal(size=(2, 500))
    assert not attack(members, others).tells_apart
    assert attack(members + 1, others).beats_guessing
    worse = attack(members - 1, others)
    assert worse.tells_apart
    assert not worse.beats_guessing
    few = members.copy()
    few[:60] += 9
    assert attack(few - 0.2, others).beats_guessing, "a few rows that are surely caught count"


def test_the_curve_passes_every_threshold() -> None:
    members, others = np.array([3.0, 1.0]), np.array([2.0, 1.0, 0.0, 0.0])
    wrong, right = roc(members, others)
    assert wrong.tolist() == [0, 0, 0.25, 0.5, 1]
    assert right.tolist() == [0, 0.5, 0.5, 1, 1]


def test_an_author_has_the_mean_of_their_rows() -> None:
    values = {LOSS: np.array([1.0, 2.0, 5.0, 7.0, 9.0])}
    found = mean_of_authors(values, ["ann", None, "ann", None, "bob"])
    assert found[LOSS].tolist() == [3, 2, 7, 9]
