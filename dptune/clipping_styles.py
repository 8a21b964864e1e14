"""The clipping styles, as values. `dptune.clipping` computes their factors.

No torch in this file, because flags and plans name a style before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from dptune._validate import refuse, require_positive, require_probability, require_within

# Clip norms, and the noise of a count: far beyond, float32 cannot hold a clipped gradient, and rounds it by more than
# `dptune.mechanism.ROUNDING`.
CLIP_NORMS = (1e-20, 1e20)
_GAMMAS = (1e-12, 1e12)  # a gradient of zeros is divided by it


@dataclass(frozen=True)
class Flat:
    """One factor per example, min(1, C / |g|), so that the norm of its whole gradient is at most C."""


@dataclass(frozen=True)
class PerLayer:
    """Each layer's part of the gradient is clipped on its own.

    Attributes:
        clip_norms: {layer: C_l} for every trained layer; None gives each of K layers C / sqrt(K). The total clip norm
            is the square root of the sum of their squares.
    """

    clip_norms: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for layer, threshold in (self.clip_norms or {}).items():
            require_within(f"clip_norms[{layer}]", threshold, CLIP_NORMS)

    @property
    def total(self) -> float | None:
        """The total clip norm, by which one privacy unit can change the sum; None if no clip norms are given."""
        if self.clip_norms is None:
            return None
        return sqrt(sum(threshold**2 for threshold in self.clip_norms.values()))


@dataclass(frozen=True)
class Automatic:
    """Every gradient is normalised, C g / (|g| + gamma), so C is a scale and not a threshold (Bu et al. 2023,
    "Automatic clipping").

    Attributes:
        gamma: above 0, from 1e-12 on; keeps tiny gradients tiny.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        require_within("gamma", self.gamma, _GAMMAS)


@dataclass(frozen=True)
class Adaptive:
    """Flat clipping with a C that follows a quantile of the norms, estimated privately (Andrew et al. 2021,
    "Differentially private learning with adaptive clipping").

    Each step also releases the number of examples with a norm of at most C, with separate noise. Both releases together
    cost as much as one release with the configured noise multiplier; in return, the gradient gets more noise.

    Attributes:
        quantile: the share of examples that should not be clipped, in (0, 1).
        learning_rate: step size for log C, above 0.
        count_noise: standard deviation of the noise on that number of examples; None for a 20th of the expected batch.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        require_probability("quantile", self.quantile)
        if self.quantile == 1:
            refuse("quantile", self.quantile, "must be below 1, because C would grow forever")
        require_positive("learning_rate", self.learning_rate)
        if self.count_noise is not None:
            require_within("count_noise", self.count_noise, CLIP_NORMS)

    def next_clip_norm(self, clip_norm: float, unclipped_share: float) -> float:
        """C for the next step, from the noisy share of examples that this step did not clip."""
        change = -self.learning_rate * (unclipped_share - self.quantile)
        # The share is noisy. Even if the noise exceeds the batch, a step changes C by at most a factor of e.
        moved = clip_norm * math.exp(min(max(change, -1.0), 1.0))
        return min(max(moved, CLIP_NORMS[0]), CLIP_NORMS[1])


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
