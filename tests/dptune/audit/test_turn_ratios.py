"""The ratios against densities that are computed by hand, over every group and every draw."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from dptune.audit.bounds import likelihood_ratios
from dptune.audit.turn_ratios import TurnRatios
from dptune.bands import INDEPENDENT, Bands, best_bands

SIGMA, UNITS = 0.8, 3


def by_hand(bands: Bands, often: float, seen_TM: np.ndarray) -> np.ndarray:
    """log of the mean density over groups and draws, over the density of a unit that is not in the data."""
    steps, b = len(seen_TM), bands.count
    inverse = np.linalg.inv(bands.matrix(steps))
    covariance = SIGMA**2 * inverse @ inverse.T
    terms = []
    for group in range(b):
        turns = range(group, steps, b)
        for drawn in product((0, 1), repeat=len(turns)):
            moved = np.zeros(steps)
            moved[list(turns)] = drawn
            chance = float(np.prod([often if one else 1 - often for one in drawn])) / b
            if chance:
                terms.append(np.log(chance) + multivariate_normal.logpdf(seen_TM.T, moved, covariance))
    without = multivariate_normal.logpdf(seen_TM.T, np.zeros(steps), covariance)
    found: np.ndarray = logsumexp(terms, axis=0) - without
    return found


@pytest.mark.parametrize("often", [0.3, 1.0])
@pytest.mark.parametrize(("count", "steps"), [(1, 4), (2, 5), (3, 7), (4, 3)])
def test_they_are_exact_after_every_step(count: int, steps: int, often: float) -> None:
    bands = INDEPENDENT if count == 1 else best_bands(count, 12)
    seen_TM = np.random.default_rng(0).normal(0.4, 1.0, (steps, UNITS))
    ratios = TurnRatios(bands, noise_multiplier=SIGMA, sampling_probability=often / bands.count, count=UNITS)
    for step in range(1, steps + 1):
        expected = by_hand(bands, often, seen_TM[:step])
        np.testing.assert_allclose(ratios.add(seen_TM[step - 1]), expected, rtol=1e-9, atol=1e-9)


def test_one_band_is_independent_noise() -> None:
    seen_TM = np.random.default_rng(1).normal(size=(6, UNITS))
    ratios = TurnRatios(INDEPENDENT, noise_multiplier=SIGMA, sampling_probability=0.2, count=UNITS)
    found = [ratios.add(seen_M) for seen_M in seen_TM][-1]
    alone = likelihood_ratios(seen_TM, noise_multiplier=SIGMA, sampling_probability=0.2).sum(0)
    np.testing.assert_allclose(found, alone, rtol=1e-12)
