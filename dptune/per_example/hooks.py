"""Records per-example gradients of every trainable parameter during one ordinary backward pass.

A forward hook passes each trainable layer's output through `_Tap`, an identity that saves the layer's input with
`save_for_backward`. Its backward receives the output's gradient and applies the layer's rule. Activation checkpointing
frees and recomputes saved tensors, but not tensors that are kept on the module. While recording, the weights themselves
need no gradient, so the per-example product replaces the ordinary product and is not extra work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from dptune._validate import HIDDEN, Described, present, refuse
from dptune.lora import LoraAdapter
from dptune.per_example.flat_gradients import FlatGradients, Layout
from dptune.per_example.precision import full_precision
from dptune.per_example.quantized import require_separate_rounding
from dptune.per_example.recorded import Recorded
from dptune.per_example.rescaling import is_rescaling, require_one_vector, tap_rescaling, vectors_of
from dptune.per_example.rules import find_rule, known_layers, layer_input, tokens_of
from dptune.per_example.uses import Outer, Use
from dptune.sharding import original_class_name, reshard

_DISTANCES = "relative_attention_bias"  # T5's embedding of distances between tokens, looked up once for all examples

# Modules of the transformers library that hold the bias of a linear layer below them under a second name, and do not
# compute with it.
_SECOND_NAMES = ("BertLMPredictionHead", "RobertaLMHead")
# Layers of the transformers library that flatten the tokens of all examples into [B * T, D] for their child layers.
_FLATTENING = ("OPTDecoderLayer",)


class _Tap(torch.autograd.Function):
    """output -> output; the backward pass gives (layer, input, output gradient) to the recorder."""

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
    """Records per-example gradients of `model`'s trainable parameters inside a `with` block, then removes its hooks.

    The first dimension of every trainable layer's input must be the examples. (A single row of position ids, which a
    model makes for the whole batch, is expanded.) Call `take()` after each backward pass. A second backward pass before
    that raises `RuntimeError`, because its gradients would silently add up.

    Raises:
        InvalidArgument: no rule covers a trainable parameter, or a layer mixes examples (batch normalisation, or
            activations that are rounded by the whole micro-batch).
    """

    def __init__(self, model: nn.Module) -> None:
        require_separate_rounding(model)
        reshard(model)  # a layer whose shards are gathered holds other tensors
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._layers = _covered_layers(model)
        self._rules = {name: find_rule(layer) for name, layer in self._layers.items()}
        self._adapters = _trained_adapters(model)
        self._layout = Layout(self._of_adapters())
        self._flat: FlatGradients | None = None
        self._lookups = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Embedding) and not name.endswith(_DISTANCES)
        }
        self._flattened = {
            f"{name}.{child}".lstrip(".")
            for name, layer in model.named_modules()
            if original_class_name(layer) in _FLATTENING
            for child, _ in layer.named_children()
        }
        self._owner = {id(parameter): name for name, parameter in self.parameters.items()}
        # By name: while a sharded layer computes, its parameters are other objects.
        self._trained = {
            layer: {
                own: self._owner[id(parameter)]
                for own, parameter in _own_parameters(module).items()
                if id(parameter) in self._owner  # a linear layer's bias may be frozen under a trained weight
            }
            for layer, module in self._layers.items()
        }
        self._layers_of = Counter(owner for own in self._trained.values() for owner in own.values())
        self._uses: dict[str, list[Use]] = {}
        self._examples: tuple[str, int] | None = None  # (first layer, number of examples) of the backward pass
        self._first_lookup: tuple[str, int] | None = None  # (name, number of examples) of the forward pass's first one
        self._backward_pass: int | None = None
        self._handles: list[RemovableHandle] = []
        self._anchors: dict[torch.device, Tensor] = {}

    def __enter__(self) -> PerExampleGradients:
        if self._handles or any(adapter.recorder is not None for adapter in self._adapters.values()):
            raise RuntimeError("PerExampleGradients is already recording: leave its `with` block first")
        for name, layer in (self._lookups | self._layers).items():
            if is_rescaling(layer):
                require_one_vector(layer, name)
                self._handles += tap_rescaling(layer, self._tap_of(name))
            else:
                self._handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))
        for name, adapter in self._adapters.items():
            adapter.recorder = _OfAdapter(self, name)
        reshard(self.model)  # what is gathered from now on needs no gradient
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for adapter in self._adapters.values():
            adapter.recorder = None
        reshard(self.model)
        self._reset()
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def take(self) -> Recorded:
        """Return and forget what the last backward pass recorded; parameters that it did not use are left out."""
        flat = None if self._flat is None else self._flat.finished()
        recorded = Recorded({name: self._uses[name] for name in self.parameters if name in self._uses}, flat)
        self._reset()
        return recorded

    def _reset(self) -> None:
        self._uses, self._flat, self._backward_pass, self._examples = {}, None, None, None

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def tap(layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            input = layer_input(layer, args, kwargs)
            if name in self._lookups:
                input, output = self._spread(name, input, output)
            if name not in self._layers:
                return output
            return self._tap_of(name)(output, input)

        return tap

    def _tap_of(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """(output, input) of a layer -> the output, whose gradient the backward pass records."""

        def tap(output: Tensor, input: Tensor) -> Tensor:
            tapped: Tensor = _Tap.apply(output, input, self.anchor(output.device), self, name)  # type: ignore[no-untyped-call]
            return tapped

        return tap

    def _spread(self, name: str, ids: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, output) of an embedding with one row per example.

        A model may make a single row of position ids for the whole batch, whose gradient would be summed over the
        batch; it is expanded. The first lookup of a forward pass, of the tokens, tells the number of examples.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2:  # some models give a frozen table their input's shape
            if name not in self._layers:
                return ids, output
            refuse(name or "the model", HIDDEN, "its ids are not [B, T], so it has no per-example gradients; freeze it")
        if self._first_lookup is None or self._first_lookup[0] == name:
            self._first_lookup = name, len(ids)
        examples = self._first_lookup[1]
        if len(ids) == 1 < examples:
            return ids.expand(examples, -1), output.expand(examples, -1, -1)
        return ids, output

    def anchor(self, device: torch.device) -> Tensor:
        """An input of the tap that needs a gradient; without one, autograd would skip the tap."""
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]

    def record_adapter(self, name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take {"A.weight" or "B.weight": (left, right) factors [B, ..., D]} of one use of an adapter."""
        self._check_same_backward()
        adapter = self._adapters[name]
        for own, (left, right) in factors.items():
            owner = self._owner.get(id(adapter.get_parameter(own)))
            if owner is None:  # frozen
                continue
            if name.removesuffix(".lora") in self._flattened and self._first_lookup is not None and left.ndim == 2:
                left, right = (part.unflatten(0, (self._first_lookup[1], -1)) for part in (left, right))
            self._check_examples(name, len(left))
            if self._flat is None:
                self._flat = FlatGradients.empty(self._layout, len(left), left)
            with full_precision(left.device):
                self._flat.add_product(owner, tokens_of(left), tokens_of(right))

    def _of_adapters(self) -> dict[str, nn.Parameter]:
        owned = {id(parameter) for adapter in self._adapters.values() for parameter in adapter.parameters()}
        return {name: parameter for name, parameter in self.parameters.items() if id(parameter) in owned}

    def _record(self, name: str, input: Tensor, grad: Tensor) -> None:
        self._check_same_backward()
        layer, rule = self._layers[name], present(self._rules[name], f"rule for {name}")
        if name in self._flattened and input.ndim == 2 and self._first_lookup is not None:
            input, grad = (part.unflatten(0, (self._first_lookup[1], -1)) for part in (input, grad))
        with full_precision(grad.device):
            self._keep(name, rule(layer, input.detach(), grad))

    def _keep(self, name: str, uses: Mapping[str, Use]) -> None:
        for parameter, use in uses.items():
            owner = self._trained[name].get(parameter)
            if owner is None:
                continue
            self._check_examples(name, len(use.right) if isinstance(use, Outer) else len(use))
            # If a layer is used twice, or two layers share a tensor, the uses add up. A shared tensor is kept as
            # factors, because its other use may be an embedding.
            if isinstance(use, Outer) and self._layers_of[owner] == 1 and use.worth_materialising():
                use = use.materialised()
            self._uses.setdefault(owner, []).append(use)

    def require_nothing_else(self, losses: Tensor) -> None:
        """Refuse losses that depend on a parameter that is not recorded, whose gradient would get no clipping or noise.

        Recorded parameters do not require a gradient, so they are not found here.

        Raises:
            InvalidArgument: there is such a parameter; the message names it if it is part of the model.
        """
        seen: set[object] = set()
        nodes = [losses.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)  # set on nodes that add to the `.grad` of a leaf
            if isinstance(leaf, nn.Parameter):
                names = [name for name, parameter in self.model.named_parameters() if parameter is leaf]
                refuse(
                    names[0] if names else "a parameter outside the model",
                    Described(f"of shape {tuple(leaf.shape)}"),
                    "the losses depend on it, but its per-example gradients are not recorded; freeze it, or make it a "
                    "trainable part of the model before the recording begins",
                )
            nodes.extend(following for following, _ in node.next_functions)

    def _check_examples(self, name: str, examples: int) -> None:
        if self._examples is None:
            self._examples = name, examples
        other, known = self._examples
        if known != examples:
            remedy = "each row must be an example; freeze the one that gets a table that all examples share"
            refuse(name, HIDDEN, f"its input has {examples} rows, that of {other} has {known}: {remedy}")

    def _check_same_backward(self) -> None:
        current = torch._C._current_graph_task_id()
        if self._backward_pass is None:
            self._backward_pass = current
        elif self._backward_pass != current:
            raise RuntimeError(
                "a second backward pass began before take(): its per-example gradients would add to the first's. "
                "Call take() after each backward pass, and use non-reentrant activation checkpointing"
            )


def _covered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of the layers that own a trainable parameter; each has a rule.

    Raises:
        InvalidArgument: a layer mixes examples or has no rule.
    """
    layers: dict[str, nn.Module] = {}
    adapters = {id(layer) for adapter in _trained_adapters(model).values() for layer in (adapter.A, adapter.B)}
    for name, layer in model.named_modules():
        if id(layer) in adapters:
            continue
        if isinstance(layer, _BatchNorm):
            remedy = "mixes the examples of a batch, so it has no per-example gradients; use LayerNorm or GroupNorm"
            refuse(name, Described(type(layer).__name__), remedy)
        trained = [key for key, parameter in _own_parameters(layer).items() if parameter.requires_grad]
        # A dictionary of parameters computes nothing; the layer that computes with them is listed separately.
        if not trained or type(layer).__name__ in _SECOND_NAMES or isinstance(layer, nn.ParameterDict):
            continue
        if reason := _reason_to_refuse(layer, name):
            parameter = f"{name}.{trained[0]}".lstrip(".")
            remedy = f"freeze it with requires_grad_(False) or train one of: {', '.join(known_layers())}"
            refuse(parameter, Described(type(layer).__name__), f"{reason}; {remedy}")
        layers[name] = layer
    _require_no_other_names(model, layers)
    return layers


def _trained_adapters(model: nn.Module) -> dict[str, LoraAdapter]:
    """{name: adapter} of those with a trainable weight. They tell their own factors, so they need no hook."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraAdapter) and any(parameter.requires_grad for parameter in layer.parameters())
    }


@dataclass(frozen=True)
class _OfAdapter:
    """Gives one adapter's factors to the recorder."""

    recorder: PerExampleGradients
    name: str

    def anchor(self, device: torch.device) -> Tensor:
        return self.recorder.anchor(device)

    def record(self, _: LoraAdapter, inputs: Tensor, reduced: Tensor, grad: Tensor, grad_reduced: Tensor) -> None:
        factors = {"A.weight": (grad_reduced, inputs), "B.weight": (grad, reduced)}
        self.recorder.record_adapter(self.name, factors)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the model, or a saved one, has no recorder."""
        return type(None), ()


def _own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """{name below the layer: parameter} of the parameters that the layer itself computes with."""
    return dict(layer.named_parameters(recurse=False)) | vectors_of(layer)


def _require_no_other_names(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a trainable parameter that is in none of `layers`, which compute with their parameters."""
    covered = {id(parameter) for layer in layers.values() for parameter in _own_parameters(layer).values()}
    of_adapters = {id(weight) for adapter in _trained_adapters(model).values() for weight in adapter.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) in covered & of_adapters:
            refuse(name, HIDDEN, "is an adapter's weight and another layer's; give the layer a weight of its own")
    covered |= of_adapters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            refuse(name, HIDDEN, "is not in any layer that computes with it; freeze it")


def _reason_to_refuse(layer: nn.Module, name: str) -> str | None:
    if isinstance(layer, nn.Embedding):
        if name.endswith(_DISTANCES):
            return "looks up distances, which all examples share, so it has no per-example gradients"
        if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
            return "max_norm, scale_grad_by_freq and sparse make one example's gradient depend on others"
    return "no per-example rule for this layer type" if find_rule(layer) is None else None
