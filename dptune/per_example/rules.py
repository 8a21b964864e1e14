"""One pure function per layer type: (layer, input, output gradient) -> {parameter name: its per-example gradients}.

Shapes: B examples, T tokens (zero or more dimensions between the first and the last), I inputs, O outputs, D features.
Gradients of matrices are `Outer`s, those of vectors are tensors [B, D]. A rule is looked up by the layer's exact type,
because a subclass may compute something else, and a wrong rule would be silent. Types of the transformers library are
recognised by name, because the engine does not import it; normalisations are also tested on numbers against autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptune.lora import is_conv1d
from dptune.per_example.rescaling import is_rescaling, rescaling
from dptune.per_example.uses import Outer, Use

Rule = Callable[[Any, Tensor, Tensor], dict[str, Use]]

_RULES: dict[type[nn.Module], Rule] = {}


def rule_for(kind: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator that registers the rule of one layer type."""

    def register(rule: Rule) -> Rule:
        _RULES[kind] = rule
        return rule

    return register


def find_rule(layer: nn.Module) -> Rule | None:
    """The rule of `layer`'s exact type, or None if there is none."""
    known = _RULES.get(type(layer)) or _NAMED.get(type(layer).__name__)
    if known is not None:
        return known
    if is_conv1d(layer):
        return conv1d
    if is_rescaling(layer):
        return rescaling
    if _is_rms_norm(layer):
        return rms_norm
    return scaled_embedding if _is_scaled_embedding(layer) else None


def known_layers() -> list[str]:
    """Names of the layer types that have a rule."""
    return sorted([*(kind.__name__ for kind in _RULES), *_NAMED, "Conv1D", "PEFT's (IA)^3 Linear"])


def layer_input(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input that a rule needs, from the arguments of the layer's forward pass."""
    if type(layer).__name__ == "OPTLearnedPositionalEmbedding":
        return _opt_positions(layer, args, kwargs)
    given: list[Tensor] = [*args, *kwargs.values()]
    return given[0]


@rule_for(nn.Linear)
def linear(layer: nn.Linear, input_BTI: Tensor, grad_BTO: Tensor) -> dict[str, Use]:
    """y = x W^T + b: the gradient of W is the sum over t of g_t x_t^T [B, O, I]; that of b the sum of g_t [B, O]."""
    inputs_BTI, grads_BTO = tokens_of(input_BTI), tokens_of(grad_BTO)
    found: dict[str, Use] = {"weight": Outer(grads_BTO, inputs_BTI, layer.out_features)}
    if layer.bias is not None:
        found["bias"] = _sum_over_tokens(grads_BTO)
    return found


def conv1d(layer: Any, input_BTI: Tensor, grad_BTO: Tensor) -> dict[str, Use]:
    """GPT-2's linear layer, y = x W + b with W [I, O]."""
    inputs_BTI, grads_BTO = tokens_of(input_BTI), tokens_of(grad_BTO)
    return {
        "weight": Outer(inputs_BTI, grads_BTO, layer.weight.shape[0]),
        "bias": _sum_over_tokens(grads_BTO),
    }


@rule_for(nn.Embedding)
def embedding(layer: nn.Embedding, ids_BT: Tensor, grad_BTD: Tensor) -> dict[str, Use]:
    """The gradient of row v is the sum of g_t over the tokens t with id v; the padding row never has a gradient."""
    ids, grads = ids_BT.flatten(1), tokens_of(grad_BTD)
    if layer.padding_idx is not None:
        grads = grads.masked_fill(ids.eq(layer.padding_idx)[..., None], 0)
    return {"weight": Outer(ids, grads, layer.num_embeddings)}


def scaled_embedding(layer: Any, ids_BT: Tensor, grad_BTD: Tensor) -> dict[str, Use]:
    """Gemma's embedding, whose rows are multiplied by a constant."""
    return embedding(layer, ids_BT, _exact(grad_BTD) * layer.embed_scale.to(grad_BTD.dtype))


@rule_for(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, input: Tensor, grad: Tensor) -> dict[str, Use]:
    """y = n(x) * w + b: the gradient of w is the sum over tokens of g * n(x), that of b the sum of g."""
    return _scale_and_shift(layer, F.layer_norm(_exact(input), layer.normalized_shape, eps=layer.eps), grad)


@rule_for(nn.RMSNorm)
def rms_norm(layer: Any, input: Tensor, grad: Tensor) -> dict[str, Use]:
    """y = x / rms(x) * w, or * (1 + w) as in Gemma."""
    return _scale_and_shift(layer, F.rms_norm(_exact(input), layer.weight.shape, eps=_epsilon(layer)), grad)


_NAMED: dict[str, Rule] = {"OPTLearnedPositionalEmbedding": embedding}


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def tokens_of(values: Tensor) -> Tensor:
    """[B, ..., D] -> [B, T, D]."""
    return values.reshape(len(values), -1, values.shape[-1])


def _sum_over_tokens(grads_BTO: Tensor) -> Tensor:
    return grads_BTO.sum(1, dtype=torch.promote_types(grads_BTO.dtype, torch.float32))


def _scale_and_shift(layer: Any, normalised: Tensor, grad: Tensor) -> dict[str, Use]:
    shape = layer.weight.shape if layer.weight is not None else layer.bias.shape
    middle = tuple(range(1, grad.ndim - len(shape)))
    grad = _exact(grad)
    found: dict[str, Use] = {}
    if layer.weight is not None:
        found["weight"] = (normalised * grad).sum(middle) if middle else normalised * grad
    if getattr(layer, "bias", None) is not None:
        found["bias"] = grad.sum(middle) if middle else grad
    return found


def _epsilon(layer: object) -> float | None:
    return next((getattr(layer, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(layer, name)), None)


def _is_rms_norm(layer: nn.Module) -> bool:
    """Whether a layer with such a name computes what `rms_norm` differentiates, tested on numbers against autograd."""
    if not type(layer).__name__.endswith(("RMSNorm", "T5LayerNorm")) or set(layer._parameters) != {"weight"}:
        return False
    own, generator = _copy_with_weights(layer)
    input, grad = torch.randn(2, 2, 3, *own.weight.shape, generator=generator, dtype=torch.float64)
    try:
        wanted = [torch.autograd.grad(own(one), own.weight, of)[0] for one, of in zip(input, grad, strict=True)]
    except (TypeError, RuntimeError):  # it needs other arguments, so it is another kind of layer
        return False
    found = rms_norm(own, input, grad)["weight"]
    # Tolerance, because the layer computes in float32 for any input.
    return isinstance(found, Tensor) and torch.allclose(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)


def _is_scaled_embedding(layer: nn.Module) -> bool:
    """Whether a subclass of the embedding returns its rows times `embed_scale`, tested on numbers."""
    if not (isinstance(layer, nn.Embedding) and isinstance(getattr(layer, "embed_scale", None), Tensor)):
        return False
    own, _ = _copy_with_weights(layer)
    own._buffers = {"embed_scale": torch.tensor(3.0)}
    ids = torch.arange(min(8, len(own.weight)))[None]
    try:
        return torch.equal(own(ids), own.weight[ids] * 3.0)
    except (TypeError, RuntimeError):
        return False


def _copy_with_weights(layer: nn.Module) -> tuple[Any, torch.Generator]:
    """A copy with random weights in float64, so that layers on the meta device can be tested too."""
    generator, own = torch.Generator().manual_seed(0), copy.copy(layer)
    shape = own._parameters["weight"].shape  # type: ignore[union-attr]
    own._parameters = {"weight": nn.Parameter(torch.rand(shape, generator=generator, dtype=torch.float64))}
    return own, generator


def _opt_positions(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The rows that OPT looks up: its positions after a shift. OPT can derive positions from the mask."""
    positions = kwargs.get("position_ids", args[2] if len(args) > 2 else None)
    if positions is None:
        mask = args[0]
        past = args[1] if len(args) > 1 else kwargs.get("past_key_values_length", 0)
        positions = (mask.cumsum(1) * mask - 1).long()[:, past:]
    shifted: Tensor = positions + layer.offset
    return shifted
