"""The audit of one training: canary rows, each in the data by a fair secret coin, and guesses of the coins.

`canaries.json` in the folder `audit` of a run holds the coins and, for each kind of adversary, a score per canary.
`dials.json` holds those of other canaries, with coins of their own, for an adversary who sees every released gradient.
Neither is private. `audit_training` compares the guesses with what the run states.

The guesses are the highest and the lowest scores, in several numbers that are fixed beforehand. Every bound pays for
all of them, and for all adversaries, by a share of 1 - confidence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dptune import accounting
from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.accounting import Spend
from dptune.audit.bounds import epsilon_of_mu
from dptune.audit.checks import Finding
from dptune.audit.one_run import LEAST_CANARIES, Score, curve_of, epsilon_of, judge, mu_of, p_value_of_curve
from dptune.audit.pages import NOT_PRIVATE

AUDIT_FOLDER, CANARIES_NAME, DIALS_NAME = "audit", "canaries.json", "dials.json"
_SHARES = (1.0, 0.5, 0.25, 0.125)  # of the canaries about which a guess is made
_DELTAS = tuple(10.0**-power for power in range(1, 13))  # where the stated curve is computed
_FORMAT = 1
_ESTIMATE = "estimate of epsilon, at least"


@dataclass(frozen=True)
class Canaries:
    """What a training leaves for its audit.

    Attributes:
        included: the coins, bool [M].
        scores: {adversary: float64 [M]}; higher means that the canary was in the data, it thinks. Empty before the
            training has ended.
        ids: the canaries' tokens, int [M, T]; None if the training keeps them elsewhere.
        before: their losses before the first step, float64 [M]; None if unknown.

    Raises:
        InvalidArgument: too few canaries, another number of scores, or a score that is not finite.
    """

    included: np.ndarray
    scores: Mapping[str, np.ndarray]
    ids: np.ndarray | None = None
    before: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.included) < LEAST_CANARIES:
            refuse("included", len(self.included), f"give at least {LEAST_CANARIES} canaries")
        for name, own in self.scores.items():
            if len(own) != len(self.included) or not np.isfinite(own).all():
                refuse("scores", name, f"give a finite number for each of the {len(self.included)} canaries")


def write_canaries(path: Path, canaries: Canaries) -> None:
    """Write `canaries.json`."""
    content = {
        "note": NOT_PRIVATE,
        "format": _FORMAT,
        "included": [bool(one) for one in canaries.included],
        "scores": {name: [float(one) for one in own] for name, own in canaries.scores.items()},
        "ids": None if canaries.ids is None else canaries.ids.tolist(),
        "before": None if canaries.before is None else canaries.before.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(content, allow_nan=False) + "\n")


def read_canaries(path: Path) -> Canaries:
    """Read `canaries.json`.

    Raises:
        InvalidArgument: it is missing, or no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            refuse("path", str(path), "is of another version of dptune; audit it with that version")
        included = np.array(content["included"], dtype=bool)
        scores = {str(name): np.array(own, dtype=np.float64) for name, own in content["scores"].items()}
        ids, before = (
            None if content.get(name) is None else np.array(content[name], dtype=kind)
            for name, kind in (("ids", np.int64), ("before", np.float64))
        )
    except OSError as error:
        refuse("path", str(path), f"cannot be read ({error.strerror}); train with canaries first")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and hasattr(error, "remedy"):
            raise
        refuse("path", str(path), "is no file of canaries; restore it from the run")
    return Canaries(included, scores, ids, before)


def canaries_in(folder: Path) -> list[Canaries]:
    """All canaries that a training has left in its folder.

    Raises:
        InvalidArgument: there are none, or see `read_canaries`.
    """
    paths = [folder / AUDIT_FOLDER / name for name in (CANARIES_NAME, DIALS_NAME)]
    return [read_canaries(path) for path in paths if path.exists()] or [read_canaries(paths[0])]


def audit_training(
    canaries: Sequence[Canaries], spends: Sequence[Spend], *, delta: float, confidence: float = 0.95
) -> list[Finding]:
    """Bounds on epsilon of one training, and a test of everything that its accounting states.

    Args:
        canaries: coins and scores, of one or more sets of canaries.
        spends: what the training spent by its ledger.
        delta: of the epsilons.
        confidence: with which all findings together are right. Above 1 - M delta or so the first bound shows nothing.

    Returns:
        Three findings for each adversary: a bound that assumes nothing, one for a mechanism that acts like a Gaussian
        one, and the probability of the guesses by the accounting.

    Raises:
        InvalidArgument: a set has no scores, or a confidence outside its range.
    """
    if not all(one.scores for one in canaries):
        refuse("scores", 0, "the training has not ended; audit it then")
    if not 0.5 <= confidence < 1:
        refuse("confidence", confidence, "give a number of at least 0.5 and below 1")
    adversaries = [(name, own, one.included) for one in canaries for name, own in one.scores.items()]
    alpha = (1 - confidence) / (3 * len(adversaries) * len(_SHARES))
    stated = accounting.compose(spends, delta=delta)
    blown = curve_of([(accounting.running_epsilon(spends, delta=one), one) for one in _DELTAS])
    findings = []
    for name, own, included in adversaries:
        scores = [judge(own, included, number) for number in guesses_of(len(own))]
        plain = _best(scores, partial(epsilon_of, delta=delta, alpha=alpha))
        by_mu = epsilon_of_mu(_best(scores, partial(mu_of, alpha=alpha)), delta)
        likely = min(p_value_of_curve(one, blown) for one in scores)
        count, words = len(own), "epsilon, at least"
        findings += [
            Finding(f"one training, {name}", plain, stated, plain > stated, words, count),
            Finding(
                f"one training, {name}, if it acts like a Gaussian", by_mu, stated, False, f"estimate of {words}", count
            ),
            Finding(
                f"probability of the guesses of {name} by the accounting",
                likely,
                alpha,
                likely < alpha,
                "probability, at most; contradicted below the stated one",
                count,
            ),
        ]
    return findings


def guesses_of(canaries: int) -> list[int]:
    """The numbers of guesses that are tried: even, and fixed by the number of canaries alone."""
    return sorted({2 * int(canaries * share / 2) for share in _SHARES}, reverse=True)


def _best(scores: Sequence[Score], bound: Callable[[Score], float]) -> float:
    return max(bound(one) for one in scores)
