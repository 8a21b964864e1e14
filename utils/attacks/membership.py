"""Who was trained on? Scores of rows, and how well they tell training rows from held-out rows.

A score is higher for a row that looks more like a training row. An attacker flags the rows above a threshold. What
counts is how many training rows are flagged while few others are (Carlini et al. 2022, "Membership inference attacks
from first principles"): a false alarm costs the attacker, and an average over all rows hides who is exposed.

Shapes: M training rows, N held-out rows, T learned tokens of one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.synthetic.overlap import compare_nearness

FALSE_ALARMS = (0.01, 0.001)  # the shares of held-out rows that may be flagged
SHOWN, SURE = 0.95, 0.999  # confidence of the intervals that are shown, and of a verdict
LOSS, REFERENCE, MIN_K = "loss", "loss compared with the start", "least likely tokens"
START = "loss of the start model"  # a control: that model has not seen the rows
_SURE_ERRORS = 3.29  # standard errors on each side, for a confidence of SURE


@dataclass(frozen=True)
class Caught:
    """What a score catches at one rate of false alarms.

    Attributes:
        false_alarms: the largest share of held-out rows that the threshold may flag.
        share: of the training rows, flagged at that threshold.
        low, high: the interval around `share` with confidence SHOWN (Clopper and Pearson 1934).
        sure_share: the lower limit for `share` with confidence SURE.
        sure_alarms: the upper limit, with confidence SURE, for the false alarms of that threshold among all rows.
    """

    false_alarms: float
    share: float
    low: float
    high: float
    sure_share: float
    sure_alarms: float


@dataclass(frozen=True)
class Attack:
    """How well one score tells training rows from held-out rows.

    Attributes:
        auc: probability that a training row scores higher than a held-out row, ties half. 0.5 is guessing.
        auc_error: its standard error.
        caught: for each of FALSE_ALARMS; None where there are too few held-out rows.
    """

    auc: float
    auc_error: float
    caught: tuple[Caught | None, ...]

    @property
    def beats_guessing(self) -> bool:
        """Whether it tells the rows apart better than a guess would, beyond chance."""
        better = any(one is not None and one.sure_share > one.sure_alarms for one in self.caught)
        return better or self.auc - _SURE_ERRORS * self.auc_error > 0.5

    @property
    def tells_apart(self) -> bool:
        """Whether the rows differ by this score in either direction, beyond chance."""
        return self.beats_guessing or self.auc + _SURE_ERRORS * self.auc_error < 0.5


def membership_scores(
    trained: Sequence[np.ndarray], start: Sequence[np.ndarray], min_k: float
) -> dict[str, np.ndarray]:
    """The scores of rows under each attack, float64 [rows] each.

    Args:
        trained: negative log-likelihoods of the learned tokens [T] of each row under the trained model; T at least 1.
        start: the same under the model that the training started from.
        min_k: per cent of the tokens that count for MIN_K.

    LOSS is the mean log-likelihood (Yeom et al. 2018). REFERENCE is how much training raised it, which takes out how
    hard a row is for any model (Carlini et al. 2021). MIN_K is the mean over the least likely tokens (Shi et al. 2024).
    START is LOSS of the start model.
    """
    after, before = (np.array([float(np.mean(one)) for one in rows]) for rows in (trained, start))
    rarest = np.array([least_likely(one, min_k) for one in trained])
    return {LOSS: -after, REFERENCE: before - after, MIN_K: rarest, START: -before}


def least_likely(losses: np.ndarray, percent: float) -> float:
    """The mean log-likelihood of the `percent` per cent least likely tokens of a row, at least one token.

    >>> least_likely(np.array([1.0, 5.0, 3.0, 2.0]), 50)
    -4.0
    """
    count = max(1, int(len(losses) * percent / 100))
    return -float(np.mean(np.sort(losses)[-count:]))


def attack(members: np.ndarray, others: np.ndarray) -> Attack:
    """How well a score tells training rows [M] from held-out rows [N]; at least 2 rows each."""
    nearness = compare_nearness(members, others)
    caught = tuple(caught_at(members, others, rate) for rate in FALSE_ALARMS)
    return Attack(nearness.nearer, nearness.nearer_error, caught)


def caught_at(members: np.ndarray, others: np.ndarray, false_alarms: float) -> Caught | None:
    """What a threshold that flags at most the share `false_alarms` of `others` [N] catches of `members` [M].

    A row is flagged if its score is above the (k + 1)-th largest of `others`, k the whole part of N `false_alarms`.
    Of all rows like `others` the share above it is Beta(k + 1, N - k) distributed, whatever the scores' distribution.
    None if k is 0: no held-out row could be flagged, so N says nothing about this rate.
    """
    allowed = math.floor(len(others) * false_alarms + 1e-9)
    if allowed == 0:
        return None
    threshold = np.sort(others)[-(allowed + 1)] if allowed < len(others) else -math.inf
    flagged, total = int((members > threshold).sum()), len(members)
    low, high = exact_interval(flagged, total, SHOWN)
    sure, _ = exact_interval(flagged, total, SURE)
    return Caught(false_alarms, flagged / total, low, high, sure, _share_above(allowed, len(others)))


def exact_interval(count: int, total: int, confidence: float) -> tuple[float, float]:
    """The interval of Clopper and Pearson for a probability, of which `count` of `total` trials came true."""
    from scipy.stats import binomtest

    found = binomtest(count, total).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def _share_above(allowed: int, total: int) -> float:
    """The upper limit, with confidence SURE, for the share of all rows above the (allowed + 1)-th largest of them."""
    from scipy.stats import beta

    return float(beta.ppf((1 + SURE) / 2, allowed + 1, total - allowed)) if allowed < total else 1.0


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of `others`, share of `members`) at or above each threshold, both ascending from 0 to 1."""
    thresholds = np.unique(np.concatenate([members, others]))[::-1]
    shares = [(len(one) - np.searchsorted(np.sort(one), thresholds)) / len(one) for one in (others, members)]
    return np.concatenate([[0.0], shares[0]]), np.concatenate([[0.0], shares[1]])


def mean_of_authors(values: Mapping[str, np.ndarray], authors: Sequence[str | None]) -> dict[str, np.ndarray]:
    """The mean of each score over each author's rows; a row without an author is one by itself.

    Args:
        values: scores by name, [rows] each.
        authors: who wrote each row.
    """
    numbers: dict[object, int] = {}
    keys = [("alone", row) if name is None else ("author", name) for row, name in enumerate(authors)]
    of_row = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    counts = np.bincount(of_row)
    return {name: np.bincount(of_row, weights=one) / counts for name, one in values.items()}
