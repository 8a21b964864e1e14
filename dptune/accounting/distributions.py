"""Epsilon by privacy loss distributions (PLD), on grids of bounded size and with a margin for rounding errors.

dp-accounting computes the distributions: Koskela et al. 2020; Doroshenko et al. 2022, "Connect the Dots". Its
discretisation is pessimistic, so in exact arithmetic any grid gives an upper bound, and a finer one a lower bound.

Its composition is not exact arithmetic. The Fourier transforms leave an absolute error in delta that grows with the
number of steps: up to 1e-16 per step was measured against exact values, most often 2e-17. It once made epsilon 10% too
small (100,000 steps, delta 1e-14). So epsilon is taken at a delta that is smaller by a margin of several times that. A
delta within the margin has no epsilon here; `bounds.py` answers instead. No torch in this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    from dptune.accounting.spend import Spend

# The margin of a release of n steps: delta x _SHARE x n + _PER_STEP x n + _PER_RELEASE. The share covers rounding
# errors in the one-step distribution, which move all of the composed one.
_PER_STEP, _PER_RELEASE, _SHARE = 4e-16, 1e-14, 1e-12
_USUAL_RANGE = 50.0  # nats; the losses of one step with less noise have proportionally larger rounding errors
_UP = 1 + 1e-9  # raises epsilon above the rounding errors of its last operations
FINEST = 1e-5  # the finest grid
_WIDEST = 1.0  # nats; on wider grids the bound says nothing
_MOST_POINTS = 200_000  # points of one step's grid: about a second
_MOST_TERMS = 4_000_000  # such points times group size: about two seconds
_MOST_COMPOSED = 3_000_000  # points after composition: about three seconds and 0.5 GB
_SPREADS, _RARE = 20.0, 20  # a composed distribution extends over so many standard deviations, or rare large losses
_LEAST_NOISE = 1e-4  # losses are above 1e7 nats: beyond any grid
_LARGEST_GROUP = 1000  # every point of a grid costs as many operations
_AT_ONCE = 30_000  # steps; beyond, dp-accounting's truncation would leave ever more empty points


class Answer(NamedTuple):
    """An upper bound on epsilon; infinity where there is none.

    Attributes:
        epsilon: the bound.
        tight: whether it is about as small as on the wanted grid without a margin.
    """

    epsilon: float
    tight: bool


NO_ANSWER = Answer(math.inf, False)


def epsilon_on_grid(spends: tuple[Spend, ...], delta: float, interval: float) -> Answer:
    """Epsilon of all spends together, on a grid of width `interval`, or wider where that is too much work.

    Args:
        spends: at least one, each with at least one step.
        delta: the probability with which the bound may fail, in (0, 1).
        interval: width of the grid, in nats.
    """
    sizes = [_size_of(one._replace(steps=1)) for one in spends]
    left = delta - margin(spends, delta, sizes)
    width = _affordable(spends, sizes, interval)
    if left <= 0 or width > _WIDEST:
        return NO_ANSWER
    spent = _on_grid(spends, left, width)
    return Answer(spent, math.isfinite(spent) and width <= interval and left >= 0.99 * delta)


@lru_cache(maxsize=256)
def _on_grid(spends: tuple[Spend, ...], delta: float, width: float) -> float:
    parts = (_composed(one_step(one._replace(steps=1), width), one.steps) for one in spends)
    total = reduce(lambda first, second: first.compose(second), parts)
    import numpy as np

    with np.errstate(over="ignore"):  # an epsilon beyond the range of floating point
        return float(total.get_epsilon_for_delta(delta)) * _UP


class Size(NamedTuple):
    """The privacy losses of one step, in nats: their range and their standard deviation."""

    range: float
    spread: float


def margin(spends: Iterable[Spend], delta: float, sizes: Iterable[Size]) -> float:
    """How much delta may be off by rounding errors after all `spends`."""
    lost = 0.0
    for one, size in zip(spends, sizes, strict=True):
        per_step = _PER_STEP * max(1.0, size.range / _USUAL_RANGE)
        lost += _PER_RELEASE + one.steps * (per_step + _SHARE * delta)
    return lost


def _affordable(spends: tuple[Spend, ...], sizes: list[Size], interval: float) -> float:
    """`interval`, doubled until its grids have few enough points."""
    pairs = list(zip(spends, sizes, strict=True))
    variance = sum(one.steps * size.spread**2 for one, size in pairs)
    composed = _SPREADS * math.sqrt(variance) + sum(min(one.steps, _RARE) * size.range for one, size in pairs)
    needed = [composed / _MOST_COMPOSED]
    needed += [size.range * max(1 / _MOST_POINTS, one.group_size / _MOST_TERMS) for one, size in pairs]
    while interval < max(needed) and interval <= _WIDEST:
        interval *= 2
    return interval


def _composed(step: PrivacyLossDistribution, steps: int) -> PrivacyLossDistribution:
    """The distribution of `steps` steps."""
    if steps <= _AT_ONCE:
        return step.self_compose(steps)
    blocks, rest = divmod(steps, _AT_ONCE)
    total = step.self_compose(_AT_ONCE).self_compose(blocks)
    return total.compose(step.self_compose(rest)) if rest else total


@lru_cache(maxsize=64)
def one_step(one: Spend, interval: float) -> PrivacyLossDistribution:
    """The pessimistic distribution of one step of `one`, on a grid of width `interval`."""
    noise_multiplier, sampling_probability = one.noise_multiplier, one.sampling_probability
    # Imported only when needed, here and below, because importing dp-accounting takes up to 5 s.
    if one.cut is not None:
        once, twice = (one_step(case, interval) for case in one.once_and_twice)
        return twice.compute_mixture(once, one.full_probability)
    if one.group_size > 1:
        from dptune.accounting.groups import mixture_of_gaussians

        return mixture_of_gaussians(noise_multiplier, sampling_probability, one.group_size, interval)
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_probability
    )


@lru_cache(maxsize=256)
def _size_of(one: Spend) -> Size:
    """The size of the losses of one step of `one`."""
    from dptune.accounting.groups import loss_size

    if one.cut is not None:
        once, twice = map(_size_of, one.once_and_twice)
        return Size(twice.range, math.hypot(once.spread, math.sqrt(one.full_probability) * twice.spread))
    if one.noise_multiplier / one.group_size < _LEAST_NOISE or one.group_size > _LARGEST_GROUP:
        return Size(math.inf, math.inf)
    return Size(*loss_size(one.noise_multiplier, one.sampling_probability, one.group_size))
