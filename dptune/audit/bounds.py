"""Guesses of an adversary -> lower bounds on epsilon, each with a stated probability of being too high.

An adversary sees a score and guesses whether a unit was in the data. Its error rates bound epsilon from below
(Wasserman and Zhou 2010; Nasr et al. 2021, "Adversary instantiation"): with (epsilon, delta) privacy, the share of
right guesses is at most e^epsilon times the share of false ones, plus delta. If the mechanism is Gaussian, they also
bound its parameter mu (Dong et al. 2019, "Gaussian differential privacy"), which is sharper.

Shapes: N games. No torch in this file. scipy takes a second to import, so functions import it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dptune._validate import refuse, require_delta, require_probability
from dptune.accounting import Spend, compose

_THRESHOLDS = 100  # tried on the games that choose


class Guesses(NamedTuple):
    """Games with their outcome.

    Attributes:
        scores: float64 [N]; higher means that the unit was in the data, the adversary thinks.
        member: bool [N]; whether it was.
    """

    scores: np.ndarray
    member: np.ndarray


class Bound(NamedTuple):
    """What the guesses show.

    Attributes:
        value: the lower bound on epsilon, or on mu; at least 0.
        games: number of games that it was computed from, without those that chose the threshold.
    """

    value: float
    games: int


def clopper_pearson(
    successes: np.ndarray | int, trials: np.ndarray | int, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) bounds on a probability; each is wrong with a probability of at most `alpha`.

    Clopper and Pearson 1934. Exact: no approximation by a Gaussian.

    Args:
        successes: number of successes, or an array of them.
        trials: number of trials; with none the bounds are 0 and 1.
        alpha: in (0, 1).
    """
    from scipy.stats import beta

    require_probability("alpha", alpha)
    hits, total = np.broadcast_arrays(np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64))
    misses = total - hits
    lower = np.where(hits > 0, beta.ppf(alpha, np.maximum(hits, 1), misses + 1), 0.0)
    upper = np.where(misses > 0, beta.ppf(1 - alpha, hits + 1, np.maximum(misses, 1)), 1.0)
    return lower, upper


def epsilon_bound(choose: Guesses, judge: Guesses, *, delta: float, alpha: float) -> Bound:
    """A lower bound on epsilon at `delta` of whatever made the scores. It assumes nothing about them.

    Args:
        choose: games that choose the adversary's threshold and which of the two guesses it makes.
        judge: independent games that the bound is computed from.
        delta: of the epsilon.
        alpha: the maximum probability that the bound is above the true epsilon.
    """
    require_delta(delta)
    thresholds = _thresholds(choose)
    best = [_epsilons(choose, thresholds, delta, alpha, says_in) for says_in in (True, False)]
    says_in = float(best[0].max()) >= float(best[1].max())
    threshold = thresholds[[int(best[not says_in].argmax())]]
    found = _epsilons(judge, threshold, delta, alpha, says_in)
    return Bound(float(found[0]), len(judge.scores))


def mu_bound(choose: Guesses, judge: Guesses, *, alpha: float) -> Bound:
    """A lower bound on mu of a Gaussian mechanism, which releases N(0, 1) or N(mu, 1).

    Use it only for games that are Gaussian by design: without sampling, or given that the unit was drawn. Otherwise
    the error rates of one threshold say nothing about other thresholds.

    Args:
        choose, judge, alpha: see `epsilon_bound`.
    """
    thresholds = _thresholds(choose)
    threshold = thresholds[[int(_mus(choose, thresholds, alpha).argmax())]]
    return Bound(float(_mus(judge, threshold, alpha)[0]), len(judge.scores))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism with parameter mu at `delta`; 0 for a mu of 0."""
    return compose([Spend(1 / mu, 1.0, 1)], delta=delta) if mu > 0 else 0.0


def likelihood_ratios(
    observed: np.ndarray, *, noise_multiplier: float, sampling_probability: float, group_size: int = 1
) -> np.ndarray:
    """The exact log-likelihood ratios of a subsampled Gaussian release: no score tells more about a unit.

    A unit's k examples are drawn with probability q each, so the release is N(j, sigma^2) with j from Binomial(k, q) if
    the unit is in the data, and N(0, sigma^2) if it is not.

    Args:
        observed: the release along the unit's direction, divided by the clip norm; any shape.
        noise_multiplier: sigma, above 0.
        sampling_probability: q, in (0, 1].
        group_size: k, at least 1.

    Returns:
        The ratios, of the shape of `observed`. Those of several steps add up.
    """
    from scipy.special import logsumexp
    from scipy.stats import binom

    drawn = np.arange(group_size + 1.0)
    log_weights = binom.logpmf(drawn, group_size, sampling_probability)
    exponents = drawn * (2 * np.asarray(observed, dtype=np.float64)[..., None] - drawn) / (2 * noise_multiplier**2)
    ratios: np.ndarray = logsumexp(log_weights + exponents, axis=-1)
    return ratios


def _thresholds(games: Guesses) -> np.ndarray:
    if not (games.member.any() and not games.member.all()):
        refuse("games", len(games.member), "some need a unit that is in the data, and some one that is not; play more")
    return np.unique(np.quantile(games.scores, np.linspace(0, 1, _THRESHOLDS)))


def _rates(games: Guesses, thresholds: np.ndarray, says_in: bool) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(right guesses [K], wrong guesses [K], games where the guess is right, games where it is wrong)."""
    scores, right = (games.scores, games.member) if says_in else (-games.scores, ~games.member)
    limits = thresholds if says_in else -thresholds
    ins, outs = np.sort(scores[right]), np.sort(scores[~right])
    hits, mistakes = (len(one) - np.searchsorted(one, limits, side="left") for one in (ins, outs))
    return hits, mistakes, len(ins), len(outs)


def _epsilons(games: Guesses, thresholds: np.ndarray, delta: float, alpha: float, says_in: bool) -> np.ndarray:
    hits, mistakes, ins, outs = _rates(games, thresholds, says_in)
    true = clopper_pearson(hits, ins, alpha / 2)[0] - delta
    false = clopper_pearson(mistakes, outs, alpha / 2)[1]
    found: np.ndarray = np.log(np.maximum(true / false, 1.0))
    return found


def _mus(games: Guesses, thresholds: np.ndarray, alpha: float) -> np.ndarray:
    from scipy.special import ndtri

    hits, mistakes, ins, outs = _rates(games, thresholds, True)
    true = clopper_pearson(hits, ins, alpha / 2)[0]
    false = clopper_pearson(mistakes, outs, alpha / 2)[1]
    with np.errstate(invalid="ignore"):  # infinity minus infinity, where no game tells anything
        found: np.ndarray = np.nan_to_num(np.maximum(ndtri(true) - ndtri(false), 0.0), nan=0.0)
    return found


def unlikely_normal(alpha: float) -> float:
    """The value that a standard Gaussian exceeds with probability `alpha`.

    >>> round(unlikely_normal(0.025), 2)
    1.96
    """
    from scipy.special import ndtri

    return -float(ndtri(alpha)) if alpha < 1 else -math.inf
