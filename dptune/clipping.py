"""Per-example norms -> clipping factors (Abadi et al. 2016, algorithm 1), in four styles.

In every style, the very gradients that were measured are scaled and summed. One privacy unit changes the sum by at most
C (with adaptive clipping, the current step's C). `PrivacyConfig.sensitivity` covers all that a step releases.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt

import torch
from torch import Tensor

from dptune._validate import refuse, require_positive
from dptune.clipping_styles import Automatic, Clipping, PerLayer

_ALL = "all parameters"


def layers_of(parameters: Iterable[str]) -> dict[str, str]:
    """{parameter: the layer that it is clipped with}: the module that owns it. An adapter's A and B are one layer."""
    return {name: name.rpartition(".")[0].removesuffix(".A").removesuffix(".B") for name in parameters}


def clip_factors(norms_B: Tensor, clip_norm: float) -> Tensor:
    """min(1, clip_norm / norm), [B]; 0 if the norm is not finite, so that no example can spoil the sum."""
    require_positive("clip_norm", clip_norm)
    factors = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)
    return torch.where(norms_B.isfinite(), factors, torch.zeros_like(factors))


def normalising_factors(norms_B: Tensor, clip_norm: float, gamma: float) -> Tensor:
    """clip_norm / (norm + gamma), [B]; 0 if the norm is not finite."""
    require_positive("clip_norm", clip_norm)
    factors = clip_norm / (norms_B + gamma)
    return torch.where(norms_B.isfinite(), factors, torch.zeros_like(factors))


def whole_norms(squared_norms: Mapping[str, Tensor]) -> Tensor:
    """Norms over all parameters together, [B] float64, from {parameter: squared norms [B]}."""
    return torch.stack(list(squared_norms.values())).sum(0).sqrt()


class Clipper:
    """Computes the factors of one clipping style for one set of parameters.

    Args:
        clipping: the clipping style.
        parameters: names of all trained parameters, whether or not a micro-batch uses them.

    Raises:
        InvalidArgument: the per-layer clip norms are for other layers.
    """

    def __init__(self, clipping: Clipping, parameters: Iterable[str]) -> None:
        self._clipping = clipping
        self._layers = layers_of(parameters)
        self._thresholds = _thresholds(clipping, set(self._layers.values())) if isinstance(clipping, PerLayer) else {}
        # {parameter: the group whose norm decides its factor}
        self.groups = self._layers if isinstance(clipping, PerLayer) else dict.fromkeys(self._layers, _ALL)

    def factors(self, squared_norms: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        """{group: factors [B]} from {group: squared norms [B] float64}."""
        norms = whole_norms(squared_norms)
        if isinstance(self._clipping, PerLayer):
            return self._by_layer(squared_norms, clip_norm, norms.isfinite())
        if isinstance(self._clipping, Automatic):
            return dict.fromkeys(squared_norms, normalising_factors(norms, clip_norm, self._clipping.gamma))
        return dict.fromkeys(squared_norms, clip_factors(norms, clip_norm))

    def _by_layer(self, squared_norms: Mapping[str, Tensor], clip_norm: float, finite_B: Tensor) -> dict[str, Tensor]:
        # If the norm of one layer overflows, the other layers of that example cannot be trusted either.
        return {
            layer: clip_factors(squared.sqrt(), self._thresholds[layer] * clip_norm) * finite_B
            for layer, squared in squared_norms.items()
        }


def _thresholds(clipping: PerLayer, layers: set[str]) -> dict[str, float]:
    """{layer: its threshold as a share of the total clip norm}; the squares of the shares add up to 1."""
    total = clipping.total
    if clipping.clip_norms is None or total is None:
        return dict.fromkeys(layers, 1 / sqrt(len(layers)))
    if missing := sorted(layers - set(clipping.clip_norms)):
        refuse("clip_norms", missing[0], "this trained layer has no clip norm; give one for every layer")
    if unknown := sorted(set(clipping.clip_norms) - layers):
        refuse("clip_norms", unknown[0], "there is no such trained layer; leave it out")
    return {layer: threshold / total for layer, threshold in clipping.clip_norms.items()}
