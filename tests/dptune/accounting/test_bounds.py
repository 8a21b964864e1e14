"""The bounds that hold at any delta, against exact values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from dptune.accounting import Spend, compose
from dptune.accounting.bounds import gaussian_epsilon, renyi_epsilon, renyi_epsilon_of
from tests.dptune.accounting import exact

DELTAS = [0.3, 1e-3, 1e-6, 1e-12, 1e-20, 1e-100, 1e-300]


@pytest.mark.parametrize("mu", [1e-4, 0.01, 1.0, 30.0, 900.0, 1e3, 1e4])
def test_the_closed_form_is_never_below_the_exact_value(mu: float) -> None:
    for delta in DELTAS:
        truth = exact.gaussian_epsilon(mu, delta)
        assert truth * (1 - 1e-12) <= gaussian_epsilon([Spend(1 / mu, 1.0, 1)], delta)
        if delta < 0.1:
            assert gaussian_epsilon([Spend(1 / mu, 1.0, 1)], delta) <= max(truth * 1.01, 1e-9)


def test_the_closed_form_survives_where_the_librarys_is_lost_in_rounding() -> None:
    """A mean of 1e10 standard deviations has an epsilon of 5e19, where an epsilon is stored in steps of 8192."""
    assert gaussian_epsilon([Spend(1e-10, 1.0, 1)], 1e-6) >= 5e19
    with np.errstate(divide="ignore"):
        assert get_epsilon_gaussian(1e17, 1e-20) == 0
    assert gaussian_epsilon([Spend(1e17, 1.0, 1)], 1e-20) > 0


def test_the_closed_form_composes_and_multiplies_the_sensitivity() -> None:
    together = gaussian_epsilon([Spend(6.0, 1.0, 8, 3), Spend(1.0, 1.0, 2)], 1e-8)
    assert together == pytest.approx(exact.gaussian_epsilon(2.0, 1e-8), rel=1e-7)


@pytest.mark.parametrize("spend", [Spend(2.0, 0.1, 1000), Spend(20.0, 0.5, 100_000), Spend(8.0, 0.9, 50, 3)])
def test_renyi_accounting_is_an_upper_bound_at_any_delta(spend: Spend) -> None:
    for delta in DELTAS[1:5]:
        assert exact.Loss(*spend[:4]).log_delta(renyi_epsilon([spend], delta)) < math.log(delta)


@pytest.mark.parametrize(("delta", "most"), [(1e-14, 6.8), (1e-16, 7.6), (1e-30, 13.0)])
def test_renyi_accounting_of_a_group_goes_on_where_distributions_end(delta: float, most: float) -> None:
    """Epsilon leapt from 5.9 at a delta of 1e-13 to 84 at 1e-14: all of a unit counted as one example."""
    spend = Spend(2.0, 0.03, 100, 4)
    found = renyi_epsilon([spend], delta)
    assert exact.Loss(*spend[:4]).log_delta(found) < math.log(delta)
    assert compose([spend], delta=1e-13) < found < most
    assert compose([spend], delta=delta) == found


@pytest.mark.parametrize("spend", [Spend(12.0, 0.05, 500, 6), Spend(1.2, 0.01, 5000, 4), Spend(1.0, 0.01, 3000, 8)])
def test_renyi_accounting_of_a_group_is_an_upper_bound(spend: Spend) -> None:
    for delta in DELTAS[1:5]:
        assert exact.Loss(*spend[:4]).log_delta(renyi_epsilon([spend], delta)) < math.log(delta)


def looseness(spend: Spend, delta: float) -> float:
    """The bound over the true epsilon."""
    bound, loss = renyi_epsilon([spend], delta), exact.Loss(*spend[:4])
    truth = brentq(lambda eps: loss.log_delta(eps) - math.log(delta), bound / 5, bound, xtol=1e-4 * bound)
    return bound / float(truth)


MEASURED = [(Spend(sigma, q, int(30 / q)), 1e-16) for sigma in (0.6, 1.0, 1.4, 3.0) for q in (1e-3, 0.03)]
MEASURED += [(spend, 1e-30) for spend, _ in MEASURED if spend.noise_multiplier in (1.0, 1.4)]
MEASURED += [(Spend(sigma, 1e-4, 300_000), 1e-16) for sigma in (0.6, 0.8, 1.0, 3.0)]


def test_renyi_accounting_is_as_loose_as_the_pages_say() -> None:
    """Where the bound is at most 50, and where it protects nobody."""
    assert max(renyi_epsilon([spend], delta) for spend, delta in MEASURED) < 50
    found = [looseness(spend, delta) for spend, delta in MEASURED]
    assert (round(min(found), 2), round(max(found), 1)) == (1.03, 3.4)
    assert round(looseness(Spend(0.4, 0.1, 1000), 1e-20), 1) == 4.8
    page = " ".join((Path(__file__).parents[3] / "docs" / "reviewers" / "privacy.md").read_text().split())
    assert "between 1.03 and 3.4 times the true epsilon, and 4.8 times where it was above 50" in page


def test_a_divergence_that_rounding_made_negative_is_no_epsilon_of_zero() -> None:
    """dp-accounting then answers 0, with a warning."""
    step = PoissonSampledDpEvent(1e-9, GaussianDpEvent(1e6))
    theirs = RdpAccountant()
    theirs.compose(SelfComposedDpEvent(step, 10_000_000))
    assert theirs._rdp.min() < 0
    assert theirs.get_epsilon(1e-30) == 0
    assert renyi_epsilon([Spend(1e6, 1e-9, 10_000_000)], 1e-30) > 0
    assert renyi_epsilon_of(SelfComposedDpEvent(step, 10_000_000), 1e-30, steps=10_000_000) > 0


def test_renyi_accounting_has_no_bound_without_noise() -> None:
    assert renyi_epsilon([Spend(1e-200, 0.5, 3)], 1e-6) == math.inf
    assert renyi_epsilon_of(GaussianDpEvent(1e-200), 1e-6, steps=1) == math.inf
    assert renyi_epsilon_of(PoissonSampledDpEvent(0.5, GaussianDpEvent(1e-200)), 1e-6, steps=1) == math.inf
