"""Sizes of a causal language model that its memory depends on. The model may be on the meta device.

What the backward pass keeps is counted tensor by tensor for a Llama decoder layer. Other architectures come close,
since the counts are read from the modules: norms in float32, queries, keys, values and attention output, the MLP's
inner tensors, and each adapter's input. A frozen base layer keeps no input. `utils/models/memory.py` turns the counts
into bytes; `tests/utils/models/test_memory.py` compares them with allocated memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dptune.lora import adapters, linear_layers, linear_sizes
from utils.models.sharded import decoder_layers

# GELU in elementary operations keeps its input, a tanh and two factors; a fused GELU keeps its input.
_WRITTEN_OUT = ("gelu_new", "gelu_fast", "quick_gelu")
# Some models cap or scale logits after the output layer: then dptune.losses computes all logits at once.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters, and of values per token that the backward pass keeps.

    Attributes:
        layers, hidden, vocabulary, heads: as in the model's configuration.
        frozen, trained: total numbers of parameters.
        root: frozen parameters outside the decoder layers (embeddings, last norm, output layer).
        layer: frozen parameters of the largest decoder layer.
        linear: those of `layer` that are in linear layers, which quantisation shrinks.
        largest_linear: parameters of the largest of these linear layers.
        exact: values per token and layer kept in float32 in any base dtype: inputs of RMSNorms, and one per
            attention head.
        plain: values per token and layer in the base's dtype: attention, MLP, other norms.
        gradients: values per token of the gradients that one layer holds at once.
        scores: bytes per head, layer and pair of tokens that attention keeps; 0 for the usual fused kernels.
        adapter_inputs: values per token in the base's dtype that adapters read, over all layers; what several read
            counts once. 0 with dropout.
        adapter_own: values per token that each adapter keeps in float32: those of its rank, and with dropout its input.
        adapter_widest: values per token of the widest input of an adapter, which is copied to float32 for its products.
        trained_head: whether the output layer has an adapter.
        whole_logits: whether an operation after the output layer needs all logits at once.
    """

    layers: int
    hidden: int
    vocabulary: int
    heads: int
    frozen: int
    trained: int
    root: int
    layer: int
    linear: int
    largest_linear: int
    exact: int
    plain: int
    gradients: int
    scores: int
    adapter_inputs: int
    adapter_own: int
    adapter_widest: int
    trained_head: bool
    whole_logits: bool


def model_sizes(model: Any) -> ModelSizes | None:
    """The sizes of a transformers causal language model, with or without adapters; None if its decoder layers cannot
    be found."""
    config, layers = model.config.get_text_config(), decoder_layers(model)
    if not layers:
        return None
    layer = max(layers, key=_frozen)
    weights = [inputs * outputs for inputs, outputs in _linears(layer).values()]
    query, key_value = _attention(config)
    inner, kept, gradients = _mlp(layer, config)
    exact, plain = _norms(layer, query, key_value)
    adapter_inputs, adapter_own = _adapter_values(layers)
    return ModelSizes(
        layers=len(layers),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        heads=config.num_attention_heads,
        frozen=_frozen(model),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        root=_frozen(model) - sum(_frozen(one) for one in layers),
        layer=_frozen(layer),
        linear=sum(weights),
        largest_linear=max(weights, default=0),
        exact=exact + config.num_attention_heads,
        plain=plain + 2 * query + 2 * key_value + kept * inner,
        gradients=gradients * inner + config.hidden_size,
        scores=_scores(config),
        adapter_inputs=adapter_inputs,
        adapter_own=adapter_own,
        adapter_widest=max((adapter.A.in_features for layer in layers for _, adapter in adapters(layer)), default=0),
        trained_head=hasattr(model.get_output_embeddings(), "lora"),
        whole_logits=any(getattr(config, name, None) not in (None, 1, 1.0) for name in _AFTER_HEAD),
    )


def _frozen(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)


def _linears(layer: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: linear_sizes(module) for name, module in linear_layers(layer).items()}


def _attention(config: Any) -> tuple[int, int]:
    """Values per token of the queries, and of the keys (the same as of the values)."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size


def _scores(config: Any) -> int:
    """Eager attention keeps its weights in float32 and in the base's dtype; a soft cap also keeps its tanh."""
    if getattr(config, "_attn_implementation", None) != "eager":
        return 0
    return 8 if getattr(config, "attn_logit_softcapping", None) else 6


def _mlp(layer: nn.Module, config: Any) -> tuple[int, int, int]:
    """(inner width, tensors of that width kept for the backward pass, gradients of that width at once)."""
    linears, experts = _linears(layer), getattr(config, "num_experts_per_tok", None)
    inner = max((inputs for inputs, outputs in linears.values() if outputs == config.hidden_size), default=0)
    if experts:  # experts' weights are in no linear layer
        inner = experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    own = 4 if activation in _WRITTEN_OUT else 1
    # With a gate, the product of activation and gate keeps both factors and has two gradients.
    return (inner, own + 2, own + 2) if experts or any("gate" in name for name in linears) else (inner, own, own + 1)


def _norms(layer: nn.Module, query: int, key_value: int) -> tuple[int, int]:
    """Values per token in norms that compute in float32 (RMSNorm), and in norms in the base's dtype."""
    exact = plain = 0
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or "norm" not in type(module).__name__.lower():
            continue
        width = {"q_norm": query, "k_norm": key_value}.get(name.rpartition(".")[2], weight.numel())
        if isinstance(module, nn.LayerNorm):
            plain += width
        else:
            exact += width
    return exact, plain


def _adapter_values(layers: Sequence[nn.Module]) -> tuple[int, int]:
    """Values per token that the adapters of `layers` keep: (inputs in the base's dtype, their own in float32).

    Adapters of one block with inputs of one width (q, k and v; gate and up) read one tensor; o reads one that attention
    keeps anyway. With dropout, each adapter has an input of its own.
    """
    inputs = own = 0
    for layer in layers:
        seen: set[tuple[str, int]] = set()
        for name, adapter in adapters(layer):
            width, source = adapter.A.in_features, (name.rpartition(".")[0], adapter.A.in_features)
            own += adapter.rank
            if adapter.has_dropout:
                own += width
            elif source not in seen:
                inputs += width
            seen.add(source)
    return inputs, own
