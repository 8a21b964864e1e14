"""Word and length statistics against values worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from utils.synthetic.statistics import (
    LENGTH_QUANTILES,
    compare_lengths,
    compare_vocabulary,
    distinct_share,
    frequency_divergence,
    rank_frequencies,
    share_outside,
)

REAL = [["the", "cat", "sat"], ["the", "dog"]]
SAMPLE = [["the", "the", "the"], ["a", "cat"]]


def test_a_vocabulary_beside_the_real_one() -> None:
    found = compare_vocabulary(SAMPLE, REAL)
    assert found.size == 3  # the, a, cat
    assert found.unseen == pytest.approx(1 / 5)  # a
    assert found.missed == pytest.approx(2 / 5)  # sat, dog
    # Runs of two: (the, the) twice and (a, cat); of three: (the, the, the).
    assert found.distinct == pytest.approx((3 / 5, 2 / 3, 1))
    p, q = {"the": 3 / 5, "a": 1 / 5, "cat": 1 / 5}, {"the": 2 / 5, "cat": 1 / 5, "sat": 1 / 5, "dog": 1 / 5}
    by_hand = 0.0
    for word in p.keys() | q.keys():
        mean = (p.get(word, 0) + q.get(word, 0)) / 2
        by_hand += sum(one[word] * math.log2(one[word] / mean) / 2 for one in (p, q) if word in one)
    assert found.frequency_divergence == pytest.approx(by_hand)


def test_the_same_words_are_no_distance_apart_and_others_are_one_bit() -> None:
    same = compare_vocabulary(REAL, list(reversed(REAL)))
    assert (same.unseen, same.missed) == (0, 0)
    assert same.frequency_divergence == pytest.approx(0, abs=1e-12)
    other = compare_vocabulary([["x"] * 5], REAL)
    assert (other.unseen, other.missed) == (1, 1)
    assert other.frequency_divergence == pytest.approx(1)


def test_samples_of_unequal_size_are_refused() -> None:
    with pytest.raises(RuntimeError, match="4 words beside 5"):
        compare_vocabulary([["a"] * 4], REAL)


def test_a_run_never_spans_two_texts_and_none_at_all_is_no_number() -> None:
    assert distinct_share([["a", "b"], ["a", "b"]], 2) == 0.5
    assert math.isnan(distinct_share([["a"], ["b"]], 2))


def test_shares_and_divergence_count_repetitions() -> None:
    assert share_outside(Counter(a=1, b=3), Counter(a=9)) == 0.75
    one, other = Counter(a=3, b=1), Counter(a=1, b=3)
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert frequency_divergence(one, other) == pytest.approx(1 - entropy)
    assert frequency_divergence(one, other) == pytest.approx(frequency_divergence(other, one))


def test_ranks_are_of_frequencies_falling() -> None:
    np.testing.assert_allclose(rank_frequencies(SAMPLE), [3 / 5, 1 / 5, 1 / 5])


def test_lengths_beside_the_real_ones() -> None:
    real, sample = [10, 20, 30, 40], [25, 35, 45, 55]  # shifted by 15
    found = compare_lengths(sample, real)
    assert found.mean == 40
    assert found.quantiles == pytest.approx([np.percentile(sample, 100 * share) for share in LENGTH_QUANTILES])
    assert found.wasserstein == pytest.approx(15)
    assert found.ks == pytest.approx(0.5)  # at 20: half of the real ones, none of the sample
    ways = [_gap(set(chosen)) >= 0.5 for chosen in itertools.combinations(range(8), 4)]
    assert found.ks_p == pytest.approx(np.mean(ways))
    assert compare_lengths(real, real).wasserstein == 0
    assert compare_lengths(real, real).ks_p == 1
    assert compare_lengths([1000 + n for n in range(50)], list(range(50))).ks_p < 1e-20


def _gap(ours: set[int]) -> float:
    """The largest gap in shares when the ranks `ours` of 0 to 7 are one sample and the others the other."""
    below = [sum(rank in ours for rank in range(upto)) for upto in range(9)]
    return max(abs(count - (upto - count)) / 4 for upto, count in enumerate(below))
