"""The histogram's sensitivity, and its noise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from dptune._validate import InvalidArgument
from dptune.grid import grid_of
from dptune.histogram import SENSITIVITY, release, votes
from dptune.keystream import Keystream

BUCKETS = 5
records = st.lists(
    st.tuples(st.integers(0, BUCKETS - 1), st.sampled_from(["ann", "bob", "cyd"])), min_size=1, max_size=12
)


def counts(rows: list[tuple[int, str]], *, by_user: bool) -> np.ndarray:
    buckets = np.array([bucket for bucket, _ in rows], dtype=np.int64)
    return votes(buckets, BUCKETS, [user for _, user in rows] if by_user else None)


@given(records, st.data())
def test_one_record_more_or_less_changes_one_bucket_by_one(rows: list[tuple[int, str]], data: st.DataObject) -> None:
    left_out = data.draw(st.integers(0, len(rows) - 1))
    without = rows[:left_out] + rows[left_out + 1 :]
    change = counts(rows, by_user=False) - counts(without, by_user=False)
    assert change[rows[left_out][0]] == 1
    assert np.count_nonzero(change) == 1


@given(records)
def test_all_records_of_a_unit_together_move_the_counts_by_at_most_the_sensitivity(rows: list[tuple[int, str]]) -> None:
    for user in {user for _, user in rows}:
        change = counts(rows, by_user=True) - counts([row for row in rows if row[1] != user], by_user=True)
        assert np.linalg.norm(change) <= SENSITIVITY + 1e-12
        assert change.sum() == pytest.approx(1)


def test_without_shares_a_unit_with_many_records_would_move_them_by_more() -> None:
    rows = [(2, "ann")] * 4 + [(1, "bob")]
    assert counts(rows, by_user=False)[2] == 4
    assert counts(rows, by_user=True).tolist() == [0, 1, 1, 0, 0]


def test_a_person_written_in_many_ways_has_one_vote() -> None:
    buckets = np.array([0, 0, 1, 1, 2])
    assert votes(buckets, 3, [7, "7.0", 7.0, " 7e0", ("row", 4)]).tolist() == [0.5, 0.5, 1.0]


def test_the_noise_is_gaussian_and_as_large_as_it_says() -> None:
    private = np.arange(20_000.0)
    noise = release(private, 10.0, Keystream.for_tests(1)) - private
    assert stats.kstest(noise, stats.norm(scale=10.0 * SENSITIVITY).cdf).pvalue > 1e-4
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.03


class Drawn:
    """A stand-in for a keystream that draws the noise next to `wanted`: a sign and a 106-bit uniform."""

    def __init__(self, wanted: np.ndarray) -> None:
        self._signs = (wanted < 0).astype(np.uint64) ^ np.uint64(1)  # the quantile of less than 1/2 is below 0 itself
        whole = [int(math.ldexp(2 * special.ndtr(-abs(value)), 106)) for value in wanted]
        self._halves = [np.array([word >> 53 for word in whole]), np.array([word & 2**53 - 1 for word in whole])]

    def uniforms(self, count: int) -> np.ndarray:
        assert count == len(self._signs)
        return self._halves.pop(0).astype(np.float64) * 2.0**-53

    def words(self, count: int) -> np.ndarray:
        return self._signs[:count]


@pytest.mark.parametrize("sigma", [0.3, 2.0, 10.0, 5000.0])
@pytest.mark.parametrize("change", [1.0, 1 / 3, 1 / 7])
def test_every_released_value_is_reached_with_and_without_a_unit(sigma: float, change: float) -> None:
    private = np.full(4000, 12.0)
    released = release(private, sigma, Keystream.for_tests(2))
    released[:1000] += np.rint(np.linspace(-5, 5, 1000) * sigma / grid_of(sigma)) * grid_of(
        sigma
    )  # out to 8 and 9 sigma
    for neighbour in (private, private + change, private - change):
        drawn = Drawn((released - neighbour) / sigma)
        assert np.array_equal(release(neighbour, sigma, drawn), released)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 10.0, 5000.0])
def test_released_values_lie_on_a_grid_that_sigma_alone_decides(sigma: float) -> None:
    step = grid_of(sigma)
    assert math.frexp(step)[0] == 0.5  # a power of two: multiples are exact
    assert 2**-11 < step / sigma <= 2**-10
    shares = np.arange(1000) / 7
    assert not np.any(release(shares, sigma) % step)


def test_the_noise_is_fine_in_its_tail_and_never_infinite() -> None:
    class Smallest:
        def uniforms(self, count: int) -> np.ndarray:
            return np.zeros(count)

        def words(self, count: int) -> np.ndarray:
            return np.arange(count, dtype=np.uint64)

    assert np.allclose(release(np.zeros(2), 1.0, Smallest()), [-11.9, 11.9], atol=0.2)


def test_no_seed_repeats_the_noise() -> None:
    released = []
    for _ in range(2):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        released.append(release(np.zeros(50), 1.0))
    # On a grid of 2^-10, two of 50 values meet by chance in 1% of all runs, and five in none of 10^9.
    assert np.isclose(*released).sum() < 5


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_no_noise_is_refused(sigma: float) -> None:
    with pytest.raises(InvalidArgument, match="noise_multiplier"):
        release(np.zeros(3), sigma)


def test_no_buckets_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="num_buckets"):
        votes(np.zeros(0, dtype=np.int64), 0)
