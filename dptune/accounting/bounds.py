"""Bounds on epsilon that hold at any delta: the Gaussian mechanism's closed form, and Renyi accounting.

Both come from dp-accounting. They take over where privacy loss distributions cannot answer (`distributions.py`). Both
also bound a unit of up to k examples. Given how many of them are drawn, a step is a Gaussian release with at most k
times the sensitivity, and the divergences are convex. So it costs at most as much as k times the sensitivity does
- in every step (closed form),
- in those steps that draw any of the k examples: a share of 1 - (1 - q)^k (Renyi accounting).
Renyi accounting also takes the divergences of the mixture that dominates the step (`groups.py`), which are far smaller.

Where draws are cut, a step is a release with at most twice the sensitivity (closed form), or the mixture of releases
with the sensitivity and with twice the sensitivity (Renyi accounting), see `truncation.py`.

Each result is raised by more than its rounding error. No torch in this file.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from dp_accounting import DpEvent

    from dptune.accounting.spend import Spend

_ROUNDING = sys.float_info.epsilon
_UP = 1 + 1e-10  # raises an epsilon above the rounding errors of its last operations
# dp-accounting's closed form is the difference of two numbers, which is lost in rounding where mu (the distance of the
# two means in standard deviations) is small. Where mu is large or delta tiny, the second number is left out.
_SMALLEST_MU, _LARGEST_MU, _SMALLEST_DELTA = 1e-5, 1e3, 1e-250
_LEAST_NOISE = 1e-9  # below, Renyi accounting divides by zero, and epsilon is above 1e17 wherever it is not 0
# Whole numbers only: their series are finite, whereas others may take seconds and diverge.
_ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 512, 1024, 2048)
_LOG_ERROR, _RELATIVE_ERROR = 4e-14, 1e-11  # above the rounding errors of one step's Renyi divergence
_GROUP_ERROR = 1e-12  # the same for a group's, which are sums of up to a million terms


def gaussian_epsilon(spends: Iterable[Spend], delta: float) -> float:
    """Epsilon of the spends if every step used every example; exact if so, with `group_size` examples in each unit
    and without a cut.

    Args:
        spends: at least one step in all.
        delta: the probability with which the bound may fail, in (0, 1).

    Returns:
        Infinity if it is beyond the range of floating point.
    """
    mu = math.hypot(*(math.sqrt(one.steps) * one.reach / one.noise_multiplier for one in spends))
    if math.isinf(mu):
        return math.inf
    if mu > _LARGEST_MU or delta < _SMALLEST_DELTA:
        from scipy.special import ndtri

        return (mu * mu / 2 + mu * max(0.0, -float(ndtri(delta)))) * _UP
    mu = max(mu, _SMALLEST_MU)
    spent = _closed_form(mu, delta / 2)
    point = mu / 2 + spent / mu  # where the smaller number's tail begins
    lost = 16 * _ROUNDING * (1 + spent + point * point) * (1 + point) / mu
    return (_closed_form(mu, delta * (1 - lost)) + 2e-12 * mu) * _UP


def _closed_form(mu: float, delta: float) -> float:
    import numpy as np
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    with np.errstate(divide="ignore"):  # the logarithm of a delta of 0
        return float(get_epsilon_gaussian(1 / mu, delta, tol=1e-12 * mu))


def renyi_epsilon(spends: Iterable[Spend], delta: float) -> float:
    """Epsilon of the spends by Renyi accounting, a looser bound; infinity where there is almost no noise.

    Args:
        spends, delta: see `gaussian_epsilon`.
    """
    import numpy as np

    total = np.zeros(len(_ORDERS))
    for one in spends:
        if one.noise_multiplier / one.reach < _LEAST_NOISE:
            return math.inf
        total += one.steps * _divergences_of_step(one)
    return _converted(_ORDERS, total, delta)


def renyi_epsilon_of(event: DpEvent, delta: float, *, steps: int) -> float:
    """Epsilon of a dp-accounting event by Renyi accounting; infinity where there is almost no noise.

    Args:
        event: what is released.
        delta: the probability with which the bound may fail, in (0, 1).
        steps: the number of steps in the event, each of which may add a rounding error.
    """
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    # With little noise, a series diverges for the lowest orders. dp-accounting skips such orders with a warning on each
    # query, which is silenced here: skipping orders can only raise the bound.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        accountant.compose(event)
    except (ZeroDivisionError, OverflowError):  # hardly any noise, whose square is 0
        return math.inf
    finally:
        logger.setLevel(level)
    # The series of fractional orders end at a relative error of 1e-13, divided by an order - 1 of 0.1.
    return _converted(accountant._orders, accountant._rdp.clip(0) + 1e-11 * steps, delta)


@lru_cache(maxsize=256)
def _divergences(noise_multiplier: float, sampling_probability: float) -> np.ndarray:
    """Upper bounds on one step's Renyi divergences, one per order."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(_ORDERS)
    accountant.compose(PoissonSampledDpEvent(sampling_probability, GaussianDpEvent(noise_multiplier)))
    # dp-accounting would read a divergence that rounding made negative as an epsilon of 0.
    divergences: np.ndarray = accountant._rdp.clip(0) * (1 + _RELATIVE_ERROR) + _LOG_ERROR
    return divergences


def _divergences_of_step(one: Spend) -> np.ndarray:
    """The same for a step of `one`, whose draws may be cut."""
    import numpy as np

    if one.cut is None:
        return _divergences_of_group(one.noise_multiplier, one.sampling_probability, one.group_size)
    once, twice = map(_divergences_of_step, one.once_and_twice)
    full, power = one.full_probability, np.array(_ORDERS) - 1.0
    room = math.log1p(-full) if full < 1 else -math.inf
    mixed: np.ndarray = np.logaddexp(room + power * once, math.log(full) + power * twice) / power
    return mixed.clip(0) * (1 + _RELATIVE_ERROR) + _LOG_ERROR


@lru_cache(maxsize=256)
def _divergences_of_group(noise_multiplier: float, sampling_probability: float, group_size: int) -> np.ndarray:
    """The same for a unit of up to `group_size` examples."""
    as_one = _divergences(noise_multiplier / group_size, _any_of(group_size, sampling_probability))
    if group_size == 1:
        return as_one
    import numpy as np

    from dptune.accounting.groups import renyi_divergences

    mixture = renyi_divergences(noise_multiplier, sampling_probability, group_size, _ORDERS)
    smaller: np.ndarray = np.minimum(as_one, mixture * (1 + _RELATIVE_ERROR) + _GROUP_ERROR)
    return smaller


def _converted(orders: Sequence[float], divergences: np.ndarray, delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    return float(compute_epsilon(orders, divergences, delta)[0]) * _UP


def _any_of(group_size: int, sampling_probability: float) -> float:
    """The probability that a draw contains any of a unit's examples, rounded up."""
    if group_size == 1 or sampling_probability == 1:
        return sampling_probability
    return min(1.0, -math.expm1(group_size * math.log1p(-sampling_probability)) * (1 + 4 * _ROUNDING))
