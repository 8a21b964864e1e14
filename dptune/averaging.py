"""Which average of the weights a run releases, instead of its last weights. No torch in this file.

theta_t are the weights after step t, of T planned steps. The released weights are one of
- the exponential average. Each step updates it to d times the average so far plus (1 - d) times theta_t. The decay d
  grows: d = min(`ema`, (1 + n) / (10 + n)) after n earlier steps, as in TensorFlow. The average begins as theta_1, so
  the weights before training have no part in it, and short runs are not dominated by their first steps;
- the plain mean over the last part of the T steps, given as a share of them (Polyak and Juditsky 1992).

Epsilon is unchanged: an average is computed only from weights after private steps and from settings chosen before the
run. Gradients are always taken at theta_t, never at the average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptune._validate import refuse

_ROUNDING = 1e-9  # so that 0.1 of 30 steps is 3 and not 4


@dataclass(frozen=True)
class Averaging:
    """Which average of the weights is released; with neither setting, the last weights.

    Attributes:
        ema: the decay of an exponential average; it is smaller in the first steps.
        average_last: the share of the planned steps whose weights are averaged, counted from the last step.

    Raises:
        InvalidArgument: both settings, or a value outside its range.

    >>> Averaging(average_last=0.1).first(30), Averaging(ema=0.9).first(30), Averaging().first(30)
    (28, 1, 31)
    >>> [round(Averaging(ema=0.9).weight(before), 3) for before in (0, 1, 40, 1000)]
    [1.0, 0.818, 0.18, 0.1]
    """

    ema: float | None = None
    average_last: float | None = None

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            refuse("ema", self.ema, "give a decay above 0 and below 1, such as 0.95")
        if self.average_last is None:
            return
        if not 0 < self.average_last <= 1:
            refuse("average_last", self.average_last, "give a share of all steps, above 0 and at most 1")
        if self.ema is not None:
            refuse(
                "average_last",
                self.average_last,
                f"ema {self.ema:g} already asks for an exponential average; give only one of the two",
            )

    @property
    def is_on(self) -> bool:
        """Whether a run keeps an average."""
        return self.ema is not None or self.average_last is not None

    @property
    def identity(self) -> dict[str, float]:
        """What a resumed run must share, as JSON values."""
        given = {"ema": self.ema, "average_last": self.average_last}
        return {name: value for name, value in given.items() if value is not None}

    def first(self, steps: int) -> int:
        """The first step whose weights count, of `steps` planned ones; `steps` + 1 if there is no average."""
        if self.average_last is not None:
            return steps + 1 - max(1, math.ceil(self.average_last * steps - _ROUNDING))
        return steps + 1 if self.ema is None else 1

    def weight(self, before: int) -> float:
        """The weight of a step in the average of it and the `before` steps before it that count."""
        if self.ema is None or not before:
            return 1 / (before + 1)
        return 1 - min(self.ema, (1 + before) / (10 + before))

    def in_words(self, steps: int, step: int) -> str | None:
        """What the average holds after `step`, of `steps` planned ones; None before the first that counts."""
        first = self.first(steps)
        if step < first:
            return None
        if self.ema is not None:
            return f"exponential average of the weights after each step, with decay {self.ema:g}"
        return f"mean of the weights after steps {first:,} to {step:,}" if step > first else None


NO_AVERAGE = Averaging()


def describe_averaging(averaging: Averaging, steps: int) -> list[str]:
    """A printed line of a plan: which average is released; no line if the last weights are."""
    told = averaging.in_words(steps, steps)
    return [] if told is None else [f"released weights       {told}"]
