"""One pure function per layer type: (layer, input, output gradient) -> {parameter name: per-example gradient}.

Shapes: B examples, T tokens (any number of dimensions between the first and the last, also none), I inputs, O outputs.
A rule is looked up by the layer's exact type: a subclass may compute something else, and a wrong rule would be silent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Rule = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]

_RULES: dict[type[nn.Module], Rule] = {}


def rule_for(kind: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator: register the rule of one layer type."""

    def register(rule: Rule) -> Rule:
        _RULES[kind] = rule
        return rule

    return register


def find_rule(layer: nn.Module) -> Rule | None:
    """The rule of `layer`'s exact type, or None."""
    return _RULES.get(type(layer))


def known_layers() -> list[str]:
    """Names of the layer types that have a rule."""
    return sorted(kind.__name__ for kind in _RULES)


@rule_for(nn.Linear)
def linear(layer: nn.Linear, input_BTI: Tensor, grad_BTO: Tensor) -> dict[str, Tensor]:
    """y = x W^T + b: the gradient of W is sum over t of g_t x_t^T [B, O, I]; that of b is sum over t of g_t [B, O]."""
    examples = input_BTI.shape[0]
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    grads_BTO = grad_BTO.reshape(examples, -1, layer.out_features).to(dtype)
    inputs_BTI = input_BTI.reshape(examples, -1, layer.in_features).to(dtype)
    found = {"weight": torch.bmm(grads_BTO.transpose(1, 2), inputs_BTI)}
    if layer.bias is not None:
        found["bias"] = grads_BTO.sum(1)
    return found
