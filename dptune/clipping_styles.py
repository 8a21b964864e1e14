"""How gradients may be clipped, as values. No torch in this file: flags and plans name a style before a model is there.

`dptune.clipping` computes the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from dptune._validate import refuse, require_positive, require_probability


@dataclass(frozen=True)
class Flat:
    """One factor an example, min(1, C / |g|): its whole gradient is at most C long."""


@dataclass(frozen=True)
class PerLayer:
    """Each layer's part of the gradient is clipped on its own.

    Attributes:
        clip_norms: {layer: C_l}, for every trained layer; None gives each of K layers C / sqrt(K). The root of their
            sum of squares is the clip norm of the whole.
    """

    clip_norms: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for layer, threshold in (self.clip_norms or {}).items():
            require_positive(f"clip_norms[{layer}]", threshold)

    @property
    def total(self) -> float | None:
        """The root of the given clip norms' sum of squares: how far one privacy unit can move the sum."""
        if self.clip_norms is None:
            return None
        return sqrt(sum(threshold**2 for threshold in self.clip_norms.values()))


@dataclass(frozen=True)
class Automatic:
    """Every gradient is normalised, C / (|g| + gamma), so that C is a scale and no longer a threshold (Bu et al. 2023,
    "Automatic clipping").

    Attributes:
        gamma: above 0, keeps tiny gradients tiny.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        require_positive("gamma", self.gamma)


@dataclass(frozen=True)
class Adaptive:
    """Flat, with a C that follows a quantile of the norms, estimated privately (Andrew et al. 2021, "Differentially
    private learning with adaptive clipping").

    Each step also releases how many examples were not longer than C, with noise of its own. Both releases together cost
    what one with the configured noise multiplier costs; the gradient gets the more noise for it.

    Attributes:
        quantile: the share of examples that shall not be clipped, in (0, 1).
        learning_rate: of log C.
        count_noise: standard deviation of the noise on that number of examples; None: a 20th of the expected batch.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        require_probability("quantile", self.quantile)
        if self.quantile == 1:
            refuse("quantile", self.quantile, "must be below 1: C would grow without end")
        require_positive("learning_rate", self.learning_rate)
        if self.count_noise is not None:
            require_positive("count_noise", self.count_noise)

    def next_clip_norm(self, clip_norm: float, unclipped_share: float) -> float:
        """C for the next step, from the noisy share of examples that were not longer than this step's."""
        change = -self.learning_rate * (unclipped_share - self.quantile)
        # The share is noisy: where the noise is larger than the batch a step may not move C by more than e.
        return clip_norm * math.exp(min(max(change, -1.0), 1.0))


Clipping = Flat | PerLayer | Automatic | Adaptive
FLAT = Flat()


def clipping_in_words(clipping: Clipping) -> str:
    """The style in words, for the report."""
    if isinstance(clipping, PerLayer):
        return "per layer, " + ("equal shares" if clipping.clip_norms is None else "given clip norms")
    if isinstance(clipping, Automatic):
        return f"automatic: every gradient is normalised, gamma {clipping.gamma:g}"
    if isinstance(clipping, Adaptive):
        return (
            f"adaptive: the clip norm starts at C and follows the {clipping.quantile:g} quantile of the norms, "
            "estimated privately within the same epsilon"
        )
    return "flat"
