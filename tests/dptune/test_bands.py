"""Bands of correlated noise: their matrix, its inverse, sensitivity and error, against plain linear algebra."""

from __future__ import annotations

import numpy as np
import pytest

from dptune import InvalidArgument
from dptune.bands import INDEPENDENT, KEPT_BYTES, MOST_BANDS, Bands, bands_within, best_bands

STEPS = 40
SOME = Bands(tuple((np.array([1.0, 0.5, 0.375]) / np.linalg.norm([1.0, 0.5, 0.375])).tolist()))


def test_the_matrix_is_lower_triangular_toeplitz_with_bands() -> None:
    matrix = SOME.matrix(STEPS)
    for row in range(STEPS):
        for column in range(STEPS):
            expected = SOME.coefficients[row - column] if 0 <= row - column < SOME.count else 0.0
            assert matrix[row, column] == expected


@pytest.mark.parametrize("bands", [INDEPENDENT, SOME, best_bands(8, STEPS)], ids=lambda bands: str(bands.count))
def test_no_row_of_an_example_that_takes_part_every_b_steps_moves_more_than_one_clip_norm_each(bands: Bands) -> None:
    """Whatever its gradients: the worst case over signs, and over random directions in each of its steps."""
    matrix = bands.matrix(STEPS)
    lengths = np.linalg.norm(matrix, axis=0)
    assert lengths.max() == pytest.approx(bands.sensitivity, rel=1e-12)
    assert lengths.max() <= 1 + 1e-12
    for first in range(bands.count):
        own = matrix[:, first :: bands.count]
        overlaps = own.T @ own - np.diag(np.diag(own.T @ own))
        assert np.abs(overlaps).max(initial=0) == 0


@pytest.mark.parametrize("bands", [INDEPENDENT, SOME, best_bands(8, STEPS)], ids=lambda bands: str(bands.count))
def test_std_and_error_are_those_of_the_inverse_matrix(bands: Bands) -> None:
    inverse = np.linalg.inv(bands.matrix(STEPS))
    for step in (1, 2, 3, STEPS):
        assert bands.std(step) == pytest.approx(np.linalg.norm(inverse[step - 1]), rel=1e-9)
    sums = np.tril(np.ones((STEPS, STEPS))) @ inverse
    assert bands.error(STEPS) == pytest.approx(np.sqrt((sums**2).sum(1).mean()), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 40, 184])
@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_no_small_change_of_the_best_bands_has_a_smaller_error(count: int, steps: int) -> None:
    best, generator = best_bands(count, steps), np.random.default_rng(0)
    for _ in range(50):
        other = np.array(best.coefficients) + generator.normal(scale=0.01, size=count)
        other[0] = abs(other[0])
        changed = Bands(tuple((other / np.linalg.norm(other)).tolist()))
        assert changed.error(steps) >= best.error(steps) * (1 - 1e-6)


@pytest.mark.parametrize("steps", [184, 1_000, 20_000, 100_000])
@pytest.mark.parametrize("count", [2, 3, 4, 8, 32])
def test_the_best_bands_have_less_error_than_any_geometric_ones(count: int, steps: int) -> None:
    """1, a, a^2, ... are nearly the best for a few bands and many steps, and with two bands there are no others."""
    errors = []
    for ratio in 1 - np.geomspace(1e-4, 0.5, 60):
        bands = ratio ** np.arange(count)
        errors.append(Bands(tuple((bands / np.linalg.norm(bands)).tolist())).error(steps))
    best = best_bands(count, steps).error(steps)
    assert best <= min(errors) * (1 + 1e-9)
    assert count > 2 or best >= min(errors) * (1 - 1e-3)


def test_more_bands_have_less_error_without_sampling() -> None:
    errors = [best_bands(count, 184).error(184) for count in (1, 2, 4, 8, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(np.sqrt(185 / 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bands(()), "bands=0: "),
        (lambda: Bands((0.0, 1.0)), "the first must be above 0"),
        (lambda: Bands((1.0, 1.0)), "their length must be 1"),
        (lambda: Bands((1.0, float("nan"))), "all must be finite"),
        (lambda: best_bands(MOST_BANDS + 1, 100), f"give at most {MOST_BANDS}"),
        (lambda: best_bands(0, 100), "bands=0: "),
        (lambda: best_bands(2, 0), "steps=0: "),
    ],
)
def test_what_is_no_factorisation_is_refused(make: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("values", [1, 10**6, 10**7, 10**8, 10**9])
def test_the_kept_noises_fit_and_one_more_would_not(values: int) -> None:
    bands = bands_within(values)
    assert 1 <= bands <= MOST_BANDS
    assert bands == 1 or (bands - 1) * 8 * values <= KEPT_BYTES
    assert bands == MOST_BANDS or bands * 8 * values > KEPT_BYTES
    assert bands_within(10, room=80) == 2
