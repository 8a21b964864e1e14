"""Correlated noise is C^-1 z, exactly and in distribution, and it starts anew with each object."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dptune import GaussianNoise, Keystream
from dptune.accounting import Spend, compose
from dptune.bands import Bands, best_bands
from dptune.correlated_noise import CorrelatedNoise
from dptune.sampling import PoissonSampler

STEPS = 7
BANDS = best_bands(3, STEPS)


def key(seed: object = 1) -> Keystream:
    return Keystream.for_tests(f"correlated {seed}")


@pytest.fixture
def noise() -> Iterator[CorrelatedNoise]:
    made = CorrelatedNoise(GaussianNoise(100_000), BANDS)
    yield made
    made.close()


def taken(noise: CorrelatedNoise, steps: int = STEPS) -> Tensor:
    """The noise of some steps, float64 [steps, P], each taken by a caller who overwrites what it is given."""
    found = []
    for _ in range(steps):
        parts = []
        for part in noise.parts():
            parts.append(part.clone())
            part.zero_()
        found.append(torch.cat(parts))
    return torch.stack(found)


@pytest.mark.parametrize("size", [5, 262_136 + 5], ids=["one stretch", "two stretches"])
def test_it_is_the_inverse_matrix_times_independent_noise(size: int) -> None:
    with GaussianNoise(size, key()) as independent:
        z = torch.stack([independent.take() for _ in range(STEPS)]).numpy()
    correlated = CorrelatedNoise(GaussianNoise(size, key()), BANDS)
    y = taken(correlated).numpy()
    correlated.close()
    assert np.abs(BANDS.matrix(STEPS) @ y - z).max() < 1e-12


def test_its_covariance_over_steps_is_that_of_the_mechanism(noise: CorrelatedNoise) -> None:
    found = torch.cov(taken(noise)).numpy()
    inverse = np.linalg.inv(BANDS.matrix(STEPS))
    expected = inverse @ inverse.T
    spread = np.sqrt((expected**2 + np.outer(expected.diagonal(), expected.diagonal())) / noise.size)
    assert (np.abs(found - expected) < 6 * spread).all()
    assert expected[1, 0] < -0.2, "a step takes back some of the one before"


def test_it_says_its_standard_deviation_and_source(noise: CorrelatedNoise) -> None:
    assert noise.relative_std == BANDS.std(1)
    for step in (1, 2, 3):
        drawn = taken(noise, 1)
        assert noise.relative_std == BANDS.std(step) == pytest.approx(drawn.std().item(), rel=0.02)
    assert noise.source.endswith("correlated over 3 steps")
    assert noise.keystream.secret


def test_a_sum_gets_the_noise_on_the_grid() -> None:
    grid, std = 2.0**-12, 3.0
    with_it, alone = (CorrelatedNoise(GaussianNoise(50, key()), BANDS) for _ in range(2))
    for step in range(4):
        sums = torch.full((50,), float(step), dtype=torch.float64)
        with_it.add_to(sums, std, grid=grid)
        assert (sums - step - std * taken(alone, 1)[0]).abs().max() <= grid / 2
        assert torch.equal(sums / grid, (sums / grid).round())
    with pytest.raises(RuntimeError, match="50 noise values for 49 sums"):
        with_it.add_to(torch.zeros(49), std, grid=grid)
    with_it.close()
    alone.close()
    with pytest.raises(RuntimeError, match="is closed"):
        next(with_it.parts())


# --- the mechanism is as private as stated ---

SIGMA, Q, DELTA, ODD = 1.0, 0.25, 0.02, 3  # a step more than a whole number of turns


def trials(bands: Bands, count: int) -> np.ndarray:
    """What `ODD` steps release about each of many units that each add 1 to a value of their own; [units, steps].

    Of the units whose group has the most turns. The sampler, its groups and the noise are the engine's own.
    """
    sampler = PoissonSampler(count, Q, key("draws"), noise_bands=bands.count)
    noise = CorrelatedNoise(GaussianNoise(count, key("noise")), bands)
    released, turns = [], np.zeros(count)
    for _ in range(ODD):
        sums, drawn = torch.zeros(count, dtype=torch.float64), sampler.draw()
        sums[drawn] = 1.0
        turns[drawn] += 1
        noise.add_to(sums, SIGMA, grid=2.0**-20)
        released.append(sums)
    noise.close()
    assert turns.max() == 2
    found: np.ndarray = torch.stack(released, 1).numpy()[sampler._groups == 0]
    return found


def likelihood_ratio(released: np.ndarray, bands: Bands, turns: tuple[int, ...]) -> np.ndarray:
    """Density of what was released with the unit, over that without it, if its turns are known."""
    matrix, p, ratio = bands.matrix(ODD), bands.count * Q, np.ones(len(released))
    seen = released @ matrix.T
    for step in turns:
        column = matrix[:, step]
        ratio *= 1 - p + p * np.exp((seen @ column - column @ column / 2) / SIGMA**2)
    return ratio


def test_what_it_releases_fits_the_stated_epsilon_and_no_cheaper_one() -> None:
    """Monte Carlo over the likelihood ratio: delta at an epsilon is the mean of 1 - e^epsilon / ratio, if above 0."""
    bands = best_bands(2, ODD)
    ratio = likelihood_ratio(trials(bands, 400_000), bands, (0, 2))

    def delta_at(spend: Spend) -> tuple[float, float]:
        losses = np.maximum(1 - np.exp(compose([spend], delta=DELTA)) / ratio, 0)
        return losses.mean(), 5 * losses.std() / np.sqrt(len(losses))

    stated = Spend(SIGMA, Q, ODD).with_bands(2)
    assert stated == Spend(SIGMA, 2 * Q, 2)
    found, error = delta_at(stated)
    assert found <= DELTA + error
    assert found >= 0.7 * DELTA, "the bound is near; the last turn's column is cut short"
    for cheaper in (stated._replace(sampling_probability=Q), stated._replace(steps=ODD // 2)):
        found, error = delta_at(cheaper)
        assert found > DELTA + error
