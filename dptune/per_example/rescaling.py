"""(IA)^3 (Liu et al. 2022): y = W (l * x) or y = l * (W x), where W is frozen and the vector l is trained.

PEFT keeps l in a dictionary of parameters, which is not a layer, and multiplies by it inside the layer that wraps W. So
the hooks are put on W: they catch the factor and the gradient of the product at W's input or behind its output.
PEFT's layer is recognised by name, because the engine does not import PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dptune._validate import refuse
from dptune.per_example.uses import Use

Tap = Callable[[Tensor, Tensor], Tensor]  # (product, the tensor multiplied by l) -> the product
_VECTORS = "ia3_l"


def is_rescaling(layer: nn.Module) -> bool:
    """Whether `layer` is PEFT's linear layer of (IA)^3."""
    kind = type(layer)
    return kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.ia3.layer"


def vectors_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """{name below `layer`: l} of a rescaling layer; empty for other layers."""
    if not is_rescaling(layer):
        return {}
    return {f"{_VECTORS}.{name}": vector for name, vector in getattr(layer, _VECTORS).items()}


def require_one_vector(layer: Any, name: str) -> None:
    """Check that the layer has exactly one active l. Several, or one that is folded into W, have another gradient.

    Raises:
        InvalidArgument: it has several, or it is merged or switched off.
    """
    active = [adapter for adapter in layer.active_adapters if adapter in layer.ia3_l]
    if len(active) != 1 or len(layer.ia3_l) != 1:
        refuse(name, ", ".join(layer.ia3_l), "several (IA)^3 vectors in one layer; train one adapter at a time")
    if layer.merged or layer.disable_adapters:
        refuse(name, active[0], "its (IA)^3 vector is merged or switched off; unmerge it and enable the adapter")


def rescaling(layer: nn.Module, factor: Tensor, grad: Tensor) -> dict[str, Use]:
    """p = l * z: the gradient of l is the sum over tokens of z_t g_t, [B, *shape of l]."""
    dtype = torch.promote_types(factor.dtype, torch.float32)
    products = factor.to(dtype) * grad.to(dtype)
    summed = products.reshape(len(products), -1, products.shape[-1]).sum(1)
    return {name: summed.view(-1, *vector.shape) for name, vector in vectors_of(layer).items()}


def tap_rescaling(layer: Any, tap: Tap) -> list[RemovableHandle]:
    """Add hooks that pass every product of `layer` through `tap`, if gradients are enabled. Returns the hooks."""
    held: list[Tensor] = []  # passed between two hooks of one forward pass

    def hold(value: Tensor) -> None:
        held[:] = [value] if torch.is_grad_enabled() else []

    def before_layer(_: object, args: tuple[Tensor, ...]) -> None:
        hold(args[0])

    def before_base(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (tap(args[0], held.pop()), *args[1:]) if held else None

    def after_base(_: object, __: object, output: Tensor) -> None:
        hold(output)

    def after_layer(_: object, __: object, output: Tensor) -> Tensor | None:
        return tap(output, held.pop()) if held else None

    if layer.is_feedforward:
        return [
            layer.register_forward_pre_hook(before_layer),
            layer.base_layer.register_forward_pre_hook(before_base),
        ]
    return [layer.base_layer.register_forward_hook(after_base), layer.register_forward_hook(after_layer)]
