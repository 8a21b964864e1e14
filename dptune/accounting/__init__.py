"""The cost of a run of the subsampled Gaussian mechanism: (sigma, q, steps, delta) <-> epsilon.

dp-accounting computes it, in one of three ways. Every epsilon is an upper bound, rounding errors included.
- Steps that use every example (q = 1, one example per unit): the Gaussian mechanism's closed form, at any delta.
- Other steps: privacy loss distributions (PLD), see `distributions.py`. Rounding leaves them no answer for tiny deltas:
  below about 1e-14 plus 4e-16 per step.
- There, and where the grid would be too large: Renyi accounting (RDP), at any delta; a looser bound.

Adjacency: add or remove one privacy unit. A unit is one sampled example, or up to `group_size` of them (`groups.py`).
Sampling: Poisson, or Poisson draws that are cut at a maximal batch (`truncation.py`). No torch in this file.

`python -m dptune.accounting` prints tables for planning before training (`__main__.py`).

dp-accounting and scipy take seconds to import, so functions import them only when they compute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from typing import NamedTuple

from dptune._validate import refuse, require_count, require_delta, require_positive, require_probability
from dptune.accounting.distributions import FINEST, Answer, epsilon_on_grid
from dptune.accounting.spend import Spend as Spend
from dptune.accounting.truncation import Cut as Cut

ADJACENCY = "add or remove one privacy unit"
ACCOUNTANT = "PLD (dp-accounting)"
GAUSSIAN_ACCOUNTANT = "Gaussian mechanism in closed form (dp-accounting)"
RENYI_ACCOUNTANT = "RDP (dp-accounting)"
USELESS_EPSILON = 50.0  # above, an epsilon protects nobody: the odds of a guess may grow by a factor of 5e21

# Grid widths. Reports start with _FINE. Below a noise multiplier of 1 they start with _COARSE: there epsilon is large,
# and the fine grid would take ten times as long to change its fifth digit. Searches and progress displays use _COARSE.
# Reports and searches go on to finer powers of ten, down to FINEST, while the grid's error matters (each grid contains
# the points of the coarser ones). A width of h spreads the losses by about h sqrt(steps). A spread of 0.02 epsilon
# makes epsilon 0.1% too large, a spread of 0.5 epsilon 50% (measured).
_FINE, _COARSE = 1e-4, 1e-3
_UNSEEN = 0.02
_MOST_STEPS = 1_000_000  # maximum in a search for the budget's end: beyond any run
_HUGE, _MOST_NOISE = 1e300, 1e9  # the squares of larger noise overflow; less noise still gives an upper bound
_LEAST_PROBABILITY = 1e-300  # smaller ones lose their last bits; a larger one still gives an upper bound
SIGMA_RANGE = (0.2, 1e4)  # below, a single step costs an epsilon of tens; above, the gradient is pure noise


class Cost(NamedTuple):
    """What releases cost.

    Attributes:
        epsilon: an upper bound; infinity if it is beyond the range of floating point.
        accountant: the method that gave it, in words.
    """

    epsilon: float
    accountant: str


def account(spends: Iterable[Spend], *, delta: float, interval: float | None = None) -> Cost:
    """The cost of everything in `spends` together, at `delta`; an epsilon of 0 if nothing was released.

    It takes a few seconds and less than 1 GB, whatever the setting. Many different settings take longer: 200 took 17 s.

    Args:
        spends: mechanisms released on the same data, in any order.
        delta: the probability with which the bound may fail, in (0, 1).
        interval: width of the PLD's grid; None chooses it. Any width gives an upper bound.

    Raises:
        InvalidArgument: a setting outside its range.
    """
    require_delta(delta)
    counted = _together(map(_checked, spends))
    if not counted:
        return Cost(0.0, ACCOUNTANT)
    return _cheapest(counted, delta, interval)


def compose(spends: Iterable[Spend], *, delta: float, interval: float | None = None) -> float:
    """The epsilon of `account`, for the same arguments."""
    return account(spends, delta=delta, interval=interval).epsilon


def _together(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """One spend for each setting, in order of first use, without those of no steps. Noise whose square would overflow
    is capped, a sampling probability near 0 is raised, and a cut that never happens is left out."""
    steps: Counter[tuple[float, float, int, Cut | None]] = Counter()
    for sigma, q, count, group_size, cut in spends:
        cut = cut if cut is not None and cut.ever_happens else None
        steps[min(sigma, _MOST_NOISE * group_size), max(q, _LEAST_PROBABILITY), group_size, cut] += count
    return tuple(
        Spend(sigma, q, count, group_size, cut) for (sigma, q, group_size, cut), count in steps.items() if count
    )


@lru_cache(maxsize=256)  # a run asks the same when it is planned and when it is reported
def _cheapest(spends: tuple[Spend, ...], delta: float, interval: float | None) -> Cost:
    """The smallest bound among those worth computing."""
    from dptune.accounting.bounds import gaussian_epsilon, renyi_epsilon

    gaussian = Cost(gaussian_epsilon(spends, delta), GAUSSIAN_ACCOUNTANT)
    if all(spend.sampling_probability == 1 for spend in spends) or gaussian.epsilon == 0:
        return gaussian
    answer = _finer(spends, delta) if interval is None else epsilon_on_grid(spends, delta, interval)
    found = Cost(answer.epsilon, ACCOUNTANT)
    if answer.tight:
        return found
    return min(found, Cost(renyi_epsilon(spends, delta), RENYI_ACCOUNTANT), gaussian)


def _finer(spends: tuple[Spend, ...], delta: float) -> Answer:
    """The answer of the widest grid whose error does not matter."""
    interval = _FINE if all(spend.noise_multiplier >= spend.group_size for spend in spends) else _COARSE
    answer, steps = epsilon_on_grid(spends, delta, interval), sum(spend.steps for spend in spends)
    while math.isfinite(answer.epsilon) and interval > (finer := _widest_grid(answer.epsilon, steps)):
        interval, coarse = finer, answer.epsilon
        answer = epsilon_on_grid(spends, delta, interval)
        answer = Answer(min(coarse, answer.epsilon), answer.tight)
    return answer


def _widest_grid(epsilon: float, steps: int) -> float:
    """The widest grid whose error is negligible in `epsilon` after `steps` steps, or else the finest grid."""
    fits = (width for width in (_COARSE, _FINE) if width * math.sqrt(steps) <= _UNSEEN * epsilon)
    return next(fits, FINEST)


def _checked(spend: Spend) -> Spend:
    require_positive("noise_multiplier", spend.noise_multiplier)
    require_probability("sampling_probability", spend.sampling_probability)
    require_count("steps", spend.steps, minimum=0)
    require_count("group_size", spend.group_size)
    if spend.cut is not None:
        require_count("max_batch", spend.cut.max_batch)
        require_count("num_examples", spend.cut.num_examples)
        require_no_groups(spend.cut.max_batch, spend.group_size)
    return spend


def require_no_groups(max_batch: int | None, group_size: int) -> None:
    """Refuse cut draws of units that have several examples, whose cost is not known."""
    if max_batch is not None and group_size > 1:
        remedy = f"draws of units with up to {group_size} examples cannot be cut; leave it out, or draw whole units"
        refuse("max_batch", max_batch, remedy)


def epsilon(
    *,
    noise_multiplier: float,
    sampling_probability: float,
    steps: int,
    delta: float,
    group_size: int = 1,
    cut: Cut | None = None,
) -> float:
    """Epsilon of `steps` steps of DP-SGD for a unit of up to `group_size` examples; for `cut` see `Spend`.

    >>> round(epsilon(noise_multiplier=1.2, sampling_probability=2048 / 75329, steps=184, delta=1e-7), 3)
    2.257
    """
    return compose([Spend(noise_multiplier, sampling_probability, steps, group_size, cut)], delta=delta)


def running_epsilon(spends: Iterable[Spend], *, delta: float) -> float:
    """`compose` on a coarser grid, for progress bars and curves.

    The bound is slightly larger, and takes milliseconds unless there is very little noise.
    """
    return compose(spends, delta=delta, interval=_COARSE)


def search_grid(target_epsilon: float, steps: int) -> float:
    """The width of a grid for quick searches: near `target_epsilon`, bounds are a few percent too large."""
    return 10 * _widest_grid(target_epsilon, steps)


def noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    group_size: int = 1,
    cut: Cut | None = None,
    rough: bool = False,
) -> float:
    """The smallest noise multiplier (rounded up to four decimals) whose epsilon is at most `target_epsilon`.

    Args:
        target_epsilon, delta, sampling_probability, steps, group_size, cut: see `epsilon`.
        rough: up to 5% more noise than that, found in a fraction of the time; for tables.

    Raises:
        InvalidArgument: a setting outside its range, or a target that no useful noise reaches.
    """
    require_positive("target_epsilon", target_epsilon)
    require_count("steps", steps)
    require_count("group_size", group_size)
    from scipy.optimize import brentq

    def excess(log_sigma: float, interval: float) -> float:
        spend = Spend(math.exp(log_sigma), sampling_probability, steps, group_size, cut)
        spent = compose([spend], delta=delta, interval=interval)
        return math.log(max(spent, 1e-12) / target_epsilon)

    # A rough grid finds enough noise quickly. It is pessimistic, so that noise is enough on the finer grid too.
    quick = partial(excess, interval=search_grid(target_epsilon, steps))
    fine = partial(excess, interval=_widest_grid(target_epsilon, steps))
    # About right where many steps act like one Gaussian release (Dong et al. 2019); elsewhere only a starting point.
    start = math.log(max(1.0, 5 * group_size * sampling_probability * math.sqrt(steps) / target_epsilon))
    low, high = _bracket(quick, start, target_epsilon, group_size)
    enough = brentq(quick, low, high, xtol=1e-3) + 2e-3
    if rough:
        return round_up(math.exp(enough))
    low = enough - 0.05
    while fine(low) <= 0:
        low, enough = low - 0.05, low
    sigma = round_up(math.exp(brentq(fine, low, enough, xtol=2e-5)))
    # The reported epsilon decides.
    while compose([Spend(sigma, sampling_probability, steps, group_size, cut)], delta=delta) > target_epsilon:
        sigma = round_up(sigma * (1 + 2e-5))
    return sigma


def planned_steps(*, num_examples: int, expected_batch_size: float, epochs: float) -> int:
    """Steps in which each example is drawn `epochs` times on average, rounded up; at least 1.

    Raises:
        InvalidArgument: a number of epochs beyond floating point.

    >>> planned_steps(num_examples=67349, expected_batch_size=1024, epochs=3)
    198
    """
    if not math.isfinite(epochs * num_examples / expected_batch_size):
        refuse("epochs", epochs, "an endless run; lower it")
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
    cut: Cut | None = None,
) -> int:
    """The largest number of steps whose `epsilon` is at most `target_epsilon`; 0 if a single step costs more.

    Args:
        target_epsilon: the budget.
        delta: the probability with which it may fail.
        noise_multiplier: of every step.
        sampling_probability: of every step.
        at_least: a number of steps that is expected to fit, such as the one that the noise was calibrated for. If it
            fits, the result is not below it. This matters because epsilon can fall by 0.1% from one number of steps to
            the next, where a finer grid starts.
        group_size, cut: see `Spend`.

    Returns:
        The number of steps, at most a million or `at_least`, whichever is larger.

    Raises:
        InvalidArgument: a setting outside its range.
    """
    require_positive("target_epsilon", target_epsilon)
    require_count("at_least", at_least, minimum=0)

    def excess(steps: int, interval: float | None = None) -> float:
        spend = Spend(noise_multiplier, sampling_probability, steps, group_size, cut)
        spent = compose([spend], delta=delta, interval=interval)
        return min(spent, _HUGE) - target_epsilon  # the search cannot use infinity

    exact, most = cache(excess), max(_MOST_STEPS, at_least)
    # The rough grid answers in milliseconds. It is pessimistic: a number of steps that fits there fits the report too.
    fits = _last_that_fits(partial(excess, interval=_COARSE), 0, max(1, at_least), most)
    if fits < at_least and exact(at_least) <= 0:
        fits = at_least
    # Epsilon rarely grows more slowly than the square root of the steps, so one stride usually passes the answer.
    share = max(1 + exact(fits) / target_epsilon, 1e-3)  # 0 where nothing is spent
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
