"""The cost of a run of the subsampled Gaussian mechanism: (sigma, q, steps, delta) <-> epsilon.

dp-accounting computes privacy loss distributions (PLD): Koskela et al. 2020; Doroshenko et al. 2022, "Connect the
Dots". Its discretisation is pessimistic, so every epsilon here is an upper bound; a finer grid only lowers it.
Adjacency: add or remove one privacy unit. A unit is one sampled example, or up to `group_size` of them (`groups.py`).
Sampling: Poisson. No torch in this file.

`python -m dptune.accounting` prints tables for planning before training (`__main__.py`).

dp-accounting and scipy take seconds to import, so functions import them only when they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

from dptune._validate import refuse, require_count, require_delta, require_positive, require_probability

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

ADJACENCY = "add or remove one privacy unit"
ACCOUNTANT = "PLD (dp-accounting)"

# Grid widths. Reports start with _FINE, or with _COARSE below a noise multiplier of 1: there epsilon is large, and the
# fine grid would take ten times as long to change its fifth digit. Searches and progress displays use _COARSE. Reports
# and searches go on to finer powers of ten, down to _FINEST, while the grid's error matters (each grid contains the
# points of the coarser ones). A width of h spreads the losses by about h sqrt(steps). A spread of 0.02 epsilon makes
# epsilon 0.1% too large, a spread of 0.5 epsilon 50% (measured).
_FINEST, _FINE, _COARSE = 1e-5, 1e-4, 1e-3
_UNSEEN = 0.02
_MOST_POINTS = 4_000_000  # grid points times group size, two seconds of work; beyond it, the grid is widened
_MOST_STEPS = 1_000_000  # maximum in a search for the budget's end: beyond any run, and one query takes ten seconds
SIGMA_RANGE = (0.2, 1e4)  # below, a single step costs an epsilon of tens; above, the gradient is pure noise


class Spend(NamedTuple):
    """`steps` releases of a Poisson-subsampled Gaussian mechanism with the same settings.

    Attributes:
        noise_multiplier: standard deviation of the noise, divided by the norm to which each example is clipped.
        sampling_probability: probability of each example, per step.
        steps: number of releases.
        group_size: maximum number of examples of one privacy unit. An example is whatever is sampled and clipped as
            one. If that is everything that an author contributes to a step, the group size is 1.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    group_size: int = 1


@lru_cache(maxsize=64)
def _one_step(
    noise_multiplier: float, sampling_probability: float, group_size: int, interval: float
) -> PrivacyLossDistribution:
    # Imported only when needed, here and below, because importing dp-accounting takes up to 5 s.
    if group_size > 1:
        from dptune.accounting.groups import mixture_of_gaussians

        return mixture_of_gaussians(noise_multiplier, sampling_probability, group_size, interval)
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=sampling_probability
    )


def compose(spends: Iterable[Spend], *, delta: float, interval: float | None = None) -> float:
    """Epsilon of everything in `spends` together, at `delta`; 0 if nothing was released.

    Args:
        spends: mechanisms released on the same data, in any order.
        delta: the probability with which the bound may fail, in (0, 1).
        interval: width of the PLD's grid; None chooses it. Any width gives an upper bound.

    Raises:
        InvalidArgument: a setting outside its range.
    """
    require_delta(delta)
    counted = tuple(spend for spend in map(_checked, spends) if spend.steps)
    if interval is not None:
        return _on_grid(counted, delta, interval)
    interval = _FINE if all(spend.noise_multiplier >= spend.group_size for spend in counted) else _COARSE
    spent, steps = _on_grid(counted, delta, interval), sum(spend.steps for spend in counted)
    while interval > (finer := _widest_grid(spent, steps)):
        interval = finer
        spent = _on_grid(counted, delta, interval)
    return spent


@lru_cache(maxsize=256)  # a run asks the same when it is planned and when it is reported
def _on_grid(spends: tuple[Spend, ...], delta: float, interval: float) -> float:
    interval, total = max([interval, *map(_affordable_grid, spends)]), None
    for sigma, q, steps, group_size in spends:
        part = _one_step(sigma, q, group_size, interval).self_compose(steps)
        total = part if total is None else total.compose(part)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def _affordable_grid(spend: Spend) -> float:
    """The finest affordable grid, a power of ten: a large group with little noise has losses in the thousands."""
    if spend.group_size == 1:
        return 0.0
    from dptune.accounting.groups import loss_range

    width = _FINEST
    losses = loss_range(spend.noise_multiplier, spend.sampling_probability, spend.group_size)
    while losses / width * spend.group_size > _MOST_POINTS:
        width *= 10
    return width


def _widest_grid(epsilon: float, steps: int) -> float:
    """The widest grid whose error is negligible in `epsilon` after `steps` steps, or else the finest grid."""
    fits = (width for width in (_COARSE, _FINE) if width * math.sqrt(steps) <= _UNSEEN * epsilon)
    return next(fits, _FINEST)


def _checked(spend: Spend) -> Spend:
    require_positive("noise_multiplier", spend.noise_multiplier)
    require_probability("sampling_probability", spend.sampling_probability)
    require_count("steps", spend.steps, minimum=0)
    require_count("group_size", spend.group_size)
    return spend


def epsilon(
    *, noise_multiplier: float, sampling_probability: float, steps: int, delta: float, group_size: int = 1
) -> float:
    """Epsilon of `steps` steps of DP-SGD for a unit of up to `group_size` examples (see `Spend`).

    >>> round(epsilon(noise_multiplier=1.2, sampling_probability=2048 / 75329, steps=184, delta=1e-7), 3)
    2.257
    """
    return compose([Spend(noise_multiplier, sampling_probability, steps, group_size)], delta=delta)


def running_epsilon(spends: Iterable[Spend], *, delta: float) -> float:
    """`compose` on a coarser grid: a slightly larger bound, within milliseconds, for progress bars and curves."""
    return compose(spends, delta=delta, interval=_COARSE)


def noise_multiplier(
    *, target_epsilon: float, delta: float, sampling_probability: float, steps: int, group_size: int = 1
) -> float:
    """The smallest noise multiplier (rounded up to four decimals) whose epsilon is at most `target_epsilon`.

    Raises:
        InvalidArgument: a setting outside its range, or a target that no useful noise reaches.
    """
    require_positive("target_epsilon", target_epsilon)
    require_count("steps", steps)
    require_count("group_size", group_size)
    from scipy.optimize import brentq

    def excess(log_sigma: float, interval: float) -> float:
        spend = Spend(math.exp(log_sigma), sampling_probability, steps, group_size)
        spent = compose([spend], delta=delta, interval=interval)
        return math.log(max(spent, 1e-12) / target_epsilon)

    # A rough grid finds enough noise quickly. It is pessimistic, so that noise is enough on the finer grid too.
    interval = _widest_grid(target_epsilon, steps)
    rough, fine = partial(excess, interval=10 * interval), partial(excess, interval=interval)
    # About right where many steps act like one Gaussian release (Dong et al. 2019); elsewhere only a starting point.
    start = math.log(max(1.0, 5 * group_size * sampling_probability * math.sqrt(steps) / target_epsilon))
    low, high = _bracket(rough, start, target_epsilon, group_size)
    enough = brentq(rough, low, high, xtol=1e-3) + 2e-3
    low = enough - 0.05
    while fine(low) <= 0:
        low, enough = low - 0.05, low
    sigma = round_up(math.exp(brentq(fine, low, enough, xtol=2e-5)))
    # The reported epsilon decides.
    while compose([Spend(sigma, sampling_probability, steps, group_size)], delta=delta) > target_epsilon:
        sigma = round_up(sigma * (1 + 2e-5))
    return sigma


def planned_steps(*, num_examples: int, expected_batch_size: float, epochs: float) -> int:
    """Steps in which each example is drawn `epochs` times on average, rounded up; at least 1.

    >>> planned_steps(num_examples=67349, expected_batch_size=1024, epochs=3)
    198
    """
    # Subtract 1e-9, so that a rounding error in the quotient does not add a step.
    return max(1, math.ceil(epochs * num_examples / expected_batch_size - 1e-9))


def max_steps(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling_probability: float,
    at_least: int = 0,
    group_size: int = 1,
) -> int:
    """The largest number of steps whose `epsilon` is at most `target_epsilon`; 0 if a single step costs more.

    Args:
        target_epsilon, delta: the budget.
        noise_multiplier, sampling_probability: settings of every step.
        at_least: a number of steps that is expected to fit, such as the one that the noise was calibrated for. If it
            fits, the result is not below it. This matters because epsilon can fall by 0.1% from one number of steps to
            the next, where a finer grid starts.
        group_size: see `Spend`.

    Returns:
        The number of steps, at most a million or `at_least`, whichever is larger.

    Raises:
        InvalidArgument: a setting outside its range.
    """
    require_positive("target_epsilon", target_epsilon)
    require_count("at_least", at_least, minimum=0)

    def excess(steps: int, interval: float | None = None) -> float:
        spend = Spend(noise_multiplier, sampling_probability, steps, group_size)
        spent = compose([spend], delta=delta, interval=interval)
        return spent - target_epsilon

    exact, most = cache(excess), max(_MOST_STEPS, at_least)
    # The rough grid answers in milliseconds. It is pessimistic: a number of steps that fits there fits the report too.
    fits = _last_that_fits(partial(excess, interval=_COARSE), 0, max(1, at_least), most)
    if fits < at_least and exact(at_least) <= 0:
        fits = at_least
    # Epsilon rarely grows more slowly than the square root of the steps, so one stride usually passes the answer.
    share = 1 + exact(fits) / target_epsilon
    return _last_that_fits(exact, fits, max(1, math.ceil(fits * (share**-2 - 1))) if fits else 1, most)


def _last_that_fits(excess: Callable[[int], float], fits: int, stride: int, most: int) -> int:
    """The number of steps, from `fits` to `most`, at which `excess` is at most 0, but above 0 after one more step."""
    from scipy.optimize import brentq

    beyond = min(fits + stride, most)
    while excess(beyond) <= 0:
        if beyond == most:
            return most
        fits, stride = beyond, 2 * stride
        beyond = min(fits + stride, most)
    steps = int(brentq(lambda steps: excess(int(steps)), fits, beyond, xtol=0.5))  # the answer, or one more
    while excess(steps) > 0:
        steps -= 1
    return steps


def _bracket(
    excess: Callable[[float], float], start: float, target_epsilon: float, group_size: int
) -> tuple[float, float]:
    """Logarithms of (too little noise, enough noise), a factor of 2 apart, searched from `start`."""
    smallest, largest = math.log(SIGMA_RANGE[0]), math.log(SIGMA_RANGE[1] * group_size)
    sigma, double = min(start, largest), math.log(2)
    while excess(sigma) > 0:
        sigma += double
        if sigma > largest:
            refuse("target_epsilon", target_epsilon, "out of reach: use fewer steps or a smaller sampling probability")
    while excess(sigma - double) <= 0:
        sigma -= double
        if sigma < smallest:
            refuse("target_epsilon", target_epsilon, "out of reach: so large that it protects nobody; lower it")
    return sigma - double, sigma


def round_up(value: float) -> float:
    """A noise multiplier, rounded up to four decimals."""
    return math.ceil(value * 1e4 - 1e-6) / 1e4
