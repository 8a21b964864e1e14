"""A step's gradient as one flat vector: its size, and each parameter's part of it.

Shapes: P all trainable parameters, flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from dptune._validate import HIDDEN, refuse
from dptune.clipping_styles import Adaptive
from dptune.lora import trainable_parameters
from dptune.mechanism import PrivacyConfig

K = TypeVar("K")


def released_size(model: nn.Module, config: PrivacyConfig) -> int:
    """Number of values that a step releases, each with noise: one per trainable parameter value, plus the count of
    adaptive clipping.

    Raises:
        InvalidArgument: nothing is trainable.
    """
    size = sum(parameter.numel() for parameter in trainable_parameters(model))
    if size == 0:
        refuse("model", HIDDEN, "has no trainable parameter; add adapters with dptune.add_lora")
    return size + isinstance(config.clipping, Adaptive)


def views(parameters: Mapping[K, nn.Parameter], flat_P: Tensor) -> dict[K, Tensor]:
    """{parameter: its part of the flat vector, in its shape}, in the model's order."""
    parts, start = {}, 0
    for name, parameter in parameters.items():
        parts[name] = flat_P[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return parts
