"""Per-example norms -> clipping factors (Abadi et al. 2016, algorithm 1), in four styles.

Whatever the style, what is summed is what was measured, scaled, and one privacy unit moves the sum by at most C (if
that is adaptive, the step's). `PrivacyConfig.sensitivity` says by how much it moves everything that a step releases.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

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
        return clip_norm * float(torch.tensor(change, dtype=torch.float64).clamp(-1, 1).exp())


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


def layers_of(parameters: Iterable[str]) -> dict[str, str]:
    """{parameter: the layer that it is clipped with}: the module that owns it, both matrices of an adapter together."""
    return {name: name.rpartition(".")[0].removesuffix(".A").removesuffix(".B") for name in parameters}


def clip_factors(norms_B: Tensor, clip_norm: float) -> Tensor:
    """min(1, clip_norm / norm), [B]; 0 for a norm that is not finite, so that no example can spoil the sum."""
    require_positive("clip_norm", clip_norm)
    factors = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)
    return torch.where(norms_B.isfinite(), factors, torch.zeros_like(factors))


def normalising_factors(norms_B: Tensor, clip_norm: float, gamma: float) -> Tensor:
    """clip_norm / (norm + gamma), [B]; 0 for a norm that is not finite."""
    require_positive("clip_norm", clip_norm)
    factors = clip_norm / (norms_B + gamma)
    return torch.where(norms_B.isfinite(), factors, torch.zeros_like(factors))


def whole_norms(squared_norms: Mapping[str, Tensor]) -> Tensor:
    """Norms over all parameters together, [B] float64, of {parameter: squared norms [B]}."""
    return torch.stack(list(squared_norms.values())).sum(0).sqrt()


class Clipper:
    """Factors in one style for one set of parameters.

    Args:
        clipping: the style.
        parameters: names of all that are trained, whether or not a micro-batch uses them.

    Raises:
        InvalidArgument: clip norms for other layers than there are.
    """

    def __init__(self, clipping: Clipping, parameters: Iterable[str]) -> None:
        self._clipping = clipping
        self._layers = layers_of(parameters)
        self._thresholds = _thresholds(clipping, set(self._layers.values())) if isinstance(clipping, PerLayer) else {}

    def factors(self, squared_norms: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        """{parameter: factors [B]} of {parameter: squared norms [B] float64}."""
        norms = whole_norms(squared_norms)
        if isinstance(self._clipping, PerLayer):
            return self._by_layer(squared_norms, clip_norm, norms.isfinite())
        if isinstance(self._clipping, Automatic):
            return dict.fromkeys(squared_norms, normalising_factors(norms, clip_norm, self._clipping.gamma))
        return dict.fromkeys(squared_norms, clip_factors(norms, clip_norm))

    def _by_layer(self, squared_norms: Mapping[str, Tensor], clip_norm: float, finite_B: Tensor) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for name, squared in squared_norms.items():
            layer = self._layers[name]
            totals[layer] = totals[layer] + squared if layer in totals else squared
        # One layer's overflow says that the others are no better.
        factors = {
            layer: clip_factors(total.sqrt(), self._thresholds[layer] * clip_norm) * finite_B
            for layer, total in totals.items()
        }
        return {name: factors[self._layers[name]] for name in squared_norms}


def _thresholds(clipping: PerLayer, layers: set[str]) -> dict[str, float]:
    """{layer: its threshold as a share of the clip norm of the whole}: the shares' squares add up to 1."""
    total = clipping.total
    if clipping.clip_norms is None or total is None:
        return dict.fromkeys(layers, 1 / sqrt(len(layers)))
    if missing := sorted(layers - set(clipping.clip_norms)):
        refuse("clip_norms", missing[0], "this trained layer has no clip norm; give one for every layer")
    if unknown := sorted(set(clipping.clip_norms) - layers):
        refuse("clip_norms", unknown[0], "there is no such trained layer")
    return {layer: threshold / total for layer, threshold in clipping.clip_norms.items()}
