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
from dptune.sharding import are_sharded, local_part

K = TypeVar("K")


def released_size(model: nn.Module, config: PrivacyConfig, rank: int = 0) -> int:
    """Number of values that this rank adds noise to in a step: one per trainable parameter value that it holds, plus
    the count of adaptive clipping. If the parameters are sharded, only rank 0 adds noise to the count.

    Raises:
        InvalidArgument: nothing is trainable.
    """
    parameters = trainable_parameters(model)
    if not sum(parameter.numel() for parameter in parameters):
        refuse("model", HIDDEN, "has no trainable parameter; add adapters with dptune.add_lora")
    held = [local_part(parameter).numel() for parameter in parameters]
    counts = rank == 0 or not are_sharded(parameters)
    return sum(held) + (isinstance(config.clipping, Adaptive) and counts)


def views(parameters: Mapping[K, Tensor], flat_P: Tensor) -> dict[K, Tensor]:
    """{parameter: its part of the flat vector, in its shape}, in the model's order."""
    parts, start = {}, 0
    for name, parameter in parameters.items():
        parts[name] = flat_P[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return parts
