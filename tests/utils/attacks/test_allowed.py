"""What epsilon allows holds for the best attack on one Gaussian release, and is near it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from dptune._validate import InvalidArgument
from dptune.accounting import Spend, epsilon
from utils.attacks.allowed import allowed_share, profile_of_run, profile_of_spends


@pytest.mark.parametrize("sigma", [0.7, 1.5, 5.0])
@pytest.mark.parametrize("false_alarms", [0.001, 0.01, 0.1, 0.5])
def test_the_best_attack_on_a_gaussian_release_is_allowed(sigma: float, false_alarms: float) -> None:
    best = norm.cdf(norm.ppf(false_alarms) + 1 / sigma)  # Neyman and Pearson
    stated = epsilon(noise_multiplier=sigma, sampling_probability=1, steps=1, delta=1e-6), 1e-6
    one = allowed_share(false_alarms, (stated,))
    many = allowed_share(false_alarms, (stated, *profile_of_spends([Spend(sigma, 1, 1)], 1e-6)))
    assert best <= many <= one
    assert many <= 2.1 * best + 1e-3, "several deltas bring it near"


def test_both_sides_count() -> None:
    """Brute force: the largest share that obeys both inequalities."""
    pair = (1.2, 0.05)
    shares = np.linspace(0, 1, 100_001)
    for alarms in (0.0, 0.01, 0.3, 0.9):
        obeys = (shares <= math.exp(1.2) * alarms + 0.05) & (1 - alarms <= math.exp(1.2) * (1 - shares) + 0.05)
        assert allowed_share(alarms, (pair,)) == pytest.approx(shares[obeys].max(), abs=2e-5)


def test_an_endless_epsilon_allows_all() -> None:
    assert allowed_share(0.01, ((math.inf, 1e-5),)) == 1


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        profile_of_run(str(tmp_path))
