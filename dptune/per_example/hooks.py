"""Per-example gradients of every trainable parameter, caught during one ordinary backward pass.

A forward hook passes each trainable layer's output through `_Tap`, an identity that saves the layer's input with
`save_for_backward`; its backward receives the output's gradient and applies the layer's rule. Saved tensors are freed
and recomputed by activation checkpointing; tensors kept on the module are not. While recording, the weights themselves
need no gradient, so the per-example product replaces the ordinary one instead of adding to it.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from dptune._validate import InvalidArgument
from dptune.per_example.rules import find_rule, known_layers


class _Tap(torch.autograd.Function):
    """output -> output; in backward, hands (layer, input, output gradient) to the recorder."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, _anchor: Tensor, recorder: PerExampleGradients, layer: str
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.recorder, ctx.layer = recorder, layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        ctx.recorder._record(ctx.layer, input, grads[0])
        return grads[0], None, None, None, None


class PerExampleGradients:
    """Records per-example gradients of `model`'s trainable parameters inside a `with` block, and leaves nothing behind.

    The first dimension of every trainable layer's input must be the examples. After each backward pass `take()` the
    gradients; a second backward pass before that raises, since its gradients would add up in silence.

    Raises:
        InvalidArgument: a trainable parameter that no rule covers, or a layer that mixes examples (batch
        normalisation).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._layers = _covered_layers(model)
        self._owner = {id(parameter): name for name, parameter in self.parameters.items()}
        self._grads: dict[str, Tensor] = {}
        self._backward_pass: int | None = None
        self._handles: list[RemovableHandle] = []
        self._anchors: dict[torch.device, Tensor] = {}

    def __enter__(self) -> PerExampleGradients:
        if self._handles:
            raise RuntimeError("PerExampleGradients is recording already: leave its `with` block first")
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reset()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def take(self) -> dict[str, Tensor]:
        """{parameter name: gradients [B, *parameter.shape]}, and forget them; unused parameters are left out."""
        grads = {name: self._grads[name] for name in self.parameters if name in self._grads}
        self._reset()
        return grads

    def _reset(self) -> None:
        self._grads, self._backward_pass = {}, None

    def _hook(self, name: str) -> Any:
        def tap(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            return _Tap.apply(output, inputs[0], self._anchor(output.device), self, name)

        return tap

    def _anchor(self, device: torch.device) -> Tensor:
        """Without an input that needs a gradient autograd would not visit the tap: the anchor is that input."""
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]

    def _record(self, name: str, input: Tensor, grad: Tensor) -> None:
        self._check_same_backward()
        layer = self._layers[name]
        rule = find_rule(layer)
        assert rule is not None, name
        for parameter_name, found in rule(layer, input.detach(), grad).items():
            owner = self._owner.get(id(getattr(layer, parameter_name)))
            if owner is None:  # frozen: a linear layer's bias under a trained weight
                continue
            known = self._grads.get(owner)
            if known is not None and len(known) != len(found):
                raise RuntimeError(
                    f"{name}: saw {len(found)} examples where another use of {owner} saw {len(known)}; "
                    "the first dimension of every trainable layer's input must be the examples"
                )
            # A layer used twice, or a tensor shared by two layers: one parameter, its uses add up.
            self._grads[owner] = found if known is None else known + found

    def _check_same_backward(self) -> None:
        current = torch._C._current_graph_task_id()
        if self._backward_pass is None:
            self._backward_pass = current
        elif self._backward_pass != current:
            raise RuntimeError(
                "a second backward pass began before take(): its per-example gradients would add to the first's. "
                "Take after each backward pass, and use non-reentrant activation checkpointing"
            )


def _covered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of the layers that own a trainable parameter, each with a rule."""
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            raise InvalidArgument(
                f"{name}={type(layer).__name__}: mixes the examples of a batch, so no example's gradient is its own; "
                "replace it by LayerNorm or GroupNorm"
            )
        trained = [key for key, parameter in layer.named_parameters(recurse=False) if parameter.requires_grad]
        if not trained:
            continue
        if find_rule(layer) is None:
            parameter = f"{name}.{trained[0]}".lstrip(".")
            raise InvalidArgument(
                f"{parameter}={type(layer).__name__}: no per-example rule for this layer type; freeze it with "
                f"requires_grad_(False) or train one of: {', '.join(known_layers())}"
            )
        layers[name] = layer
    return layers
