"""How many coins an adversary may guess after one training, if a privacy statement holds.

M canary rows are each in the training data or not, by a fair coin of their own. After the training an adversary guesses
some of the coins and abstains from the rest. Privacy limits how many of its guesses can be right:

- With (epsilon, delta), by Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run".
- With a trade-off function, by Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one run",
  which is sharper. The trade-off function is that of a Gaussian mechanism, or follows from several stated (epsilon,
  delta) at once.

Each function gives a p-value: the probability of so many right guesses, at most, if the statement holds. Adjacency: add
or remove one canary. No torch in this file. scipy takes a second to import, so functions import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from dptune._validate import refuse, require_count, require_positive

LEAST_CANARIES = 16  # with fewer, no number of right guesses shows much
_HALVINGS = 60  # of the range of a mu or an epsilon, and of the logarithm of a p-value
_LEAST = 1e-30  # p-values below are not told apart
_MOST_MU, _MOST_EPSILON = 40.0, 200.0  # beyond, nothing is protected


class Score(NamedTuple):
    """The adversary's guesses.

    Attributes:
        canaries: M, all canaries.
        guesses: for how many of them it did not abstain; a number that was fixed before the coins were seen.
        right: how many of the guesses were right.
    """

    canaries: int
    guesses: int
    right: int


Blown = Callable[[float], float]  # y -> the least x for which 1 - f(x) >= y, f the trade-off function


def judge(scores: np.ndarray, included: np.ndarray, guesses: int) -> Score:
    """Guess "in" for the highest scores and "out" for the lowest, half of the guesses each.

    Args:
        scores: float [M]; higher means that the canary was in the data, the adversary thinks.
        included: bool [M]; the coins.
        guesses: an even number of guesses, at most M.

    Raises:
        InvalidArgument: not one coin for each score, or another number of guesses.
    """
    if len(scores) != len(included):
        refuse("included", len(included), f"there are {len(scores)} scores; give a coin for each")
    if guesses % 2 or not 0 < guesses <= len(scores):
        refuse("guesses", guesses, f"must be even, above 0 and at most the {len(scores)} canaries")
    order = np.argsort(scores, kind="stable")
    out, within = order[: guesses // 2], order[len(order) - guesses // 2 :]
    right = int((~included[out]).sum()) + int(included[within].sum())
    return Score(len(scores), guesses, right)


def p_value(score: Score, epsilon: float, delta: float) -> float:
    """The probability of so many right guesses, at most, if the training is (epsilon, delta) private (Steinke et al.).

    Args:
        score: what the adversary guessed.
        epsilon: at least 0.
        delta: from 0 to below 1.
    """
    from scipy.stats import binom

    _check(score)
    accuracy = 1 / (1 + math.exp(-epsilon))  # of one guess, with delta 0
    tail = float(binom.sf(score.right - 1, score.guesses, accuracy))
    if not score.right:
        return 1.0
    fewer = binom.pmf(np.arange(score.right)[::-1], score.guesses, accuracy).cumsum()  # P(v - i <= guesses < v)
    worst = float((fewer / np.arange(1, score.right + 1)).max())
    return min(1.0, tail + 2 * score.canaries * delta * worst)


def p_value_of_curve(score: Score, blown: Blown) -> float:
    """The probability of so many right guesses, at most, with a trade-off function (Mahloujifar et al.).

    Args:
        score: what the adversary guessed.
        blown: of the trade-off function; see `gaussian` and `curve_of`.
    """
    _check(score)
    if not score.right:
        return 1.0
    low, high = math.log(_LEAST), 0.0  # the smallest probability that is ruled out
    if not _rules_out(score, blown, 1.0):
        return 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _rules_out(score, blown, math.exp(middle)) else (middle, high)
    return math.exp(high)


def _rules_out(score: Score, blown: Blown, probability: float) -> bool:
    """Whether the guesses are right so often with less than this probability."""
    guesses, share = score.guesses, probability * score.guesses / score.canaries
    right = share * score.right / guesses  # r_c and h_c of the recursion, which goes down to 0 right guesses
    wrong = share * (guesses - score.right) / guesses
    for number in range(score.right - 1, -1, -1):
        before, wrong = wrong, max(wrong, blown(right))
        right += number / (guesses - number) * (wrong - before)
        if right + wrong > guesses / score.canaries:
            return True
    return False


def gaussian(mu: float) -> Blown:
    """That of a Gaussian mechanism with parameter mu, which releases N(0, 1) or N(mu, 1)."""
    from scipy.special import ndtr, ndtri

    return lambda y: float(ndtr(ndtri(min(max(y, 0.0), 1.0)) - mu))


def curve_of(stated: Iterable[tuple[float, float]]) -> Blown:
    """That of a mechanism which is (epsilon, delta) private for each of several pairs; at least one."""
    pairs = np.array(list(stated), dtype=np.float64)
    if not len(pairs):
        refuse("stated", 0, "give at least one epsilon with its delta")
    growth, deltas = np.exp(pairs[:, 0]), pairs[:, 1]

    def blown(y: float) -> float:
        most = np.maximum((y - deltas) / growth, 1 - deltas - growth * (1 - y)).max()
        return float(min(max(most, 0.0), 1.0))

    return blown


def epsilon_of(score: Score, *, delta: float, alpha: float) -> float:
    """A lower bound on epsilon at `delta`, above the truth with a probability of at most `alpha` (Steinke et al.)."""
    return _largest(lambda epsilon: p_value(score, epsilon, delta) <= alpha, _MOST_EPSILON)


def mu_of(score: Score, *, alpha: float) -> float:
    """A lower bound on mu of a Gaussian mechanism, above the truth with a probability of at most `alpha`."""
    return _largest(lambda mu: _rules_out_at(score, mu, alpha), _MOST_MU)


def _rules_out_at(score: Score, mu: float, alpha: float) -> bool:
    return score.right > 0 and _rules_out(score, gaussian(mu), alpha)


def _largest(ruled_out: Callable[[float], bool], most: float) -> float:
    """The largest value from 0 on that is ruled out, rounded down; 0 if none is."""
    if not ruled_out(0.0):
        return 0.0
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if ruled_out(middle) else (low, middle)
        if high - low < 1e-6 * most:
            break
    return low


def _check(score: Score) -> None:
    require_count("canaries", score.canaries)
    require_positive("guesses", score.guesses)
    if not 0 <= score.right <= score.guesses <= score.canaries:
        refuse("right", score.right, f"there are {score.guesses} guesses about {score.canaries} canaries")
