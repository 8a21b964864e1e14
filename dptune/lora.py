"""Low-rank adaptation (Hu et al. 2021): y = W x + (alpha / r) B A x, with W frozen and A, B trained.

rsLoRA (Kalajdzievski 2023) has alpha / sqrt(r) instead of alpha / r.

Shapes: I inputs, O outputs, R rank. A is [R, I]; B is [O, R] and zero at the start, so the model begins as the base.
The adapter computes in float32, whatever the base's dtype. In training its input may pass through dropout, which draws
a mask for each number independently, so it couples no examples. An adapter is attached by changing the layer's class.
The layer keeps its place and its parameter names (`...q_proj.weight`, `lm_head.weight`), and the adapter is its child
`.lora`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dptune._validate import refuse, require_count, require_positive
from dptune.lora_targets import ALL_LINEAR, DEFAULT_TARGETS
from dptune.sharding import reshard


class Recorder(Protocol):
    """What an adapter tells of its backward passes while its per-example gradients are recorded."""

    def anchor(self, device: torch.device) -> Tensor:
        """A tensor that needs a gradient; without one, autograd would skip an adapter whose input needs none."""

    def record(self, adapter: LoraAdapter, inputs: Tensor, reduced: Tensor, grad: Tensor, grad_reduced: Tensor) -> None:
        """Take the factors of one use: the gradient of A is grad_reduced^T inputs, that of B is grad^T reduced.

        Args:
            adapter: whose weights they are.
            inputs: [..., I], in the layer's precision.
            reduced: scale A x, [..., R].
            grad: the gradient of the output, [..., O].
            grad_reduced: scale B^T grad, [..., R].
        """


class _LowRank(torch.autograd.Function):
    """x [..., I] -> scale B A x [..., O]; keeps x as it is and A x, and gives the backward pass to the recorder."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        adapter: LoraAdapter,
        recorder: Recorder | None,
        _anchor: Tensor | None,
    ) -> Tensor:
        reduced = F.linear(x.to(A.dtype), A).mul_(adapter.scale)
        ctx.save_for_backward(x, reduced, A, B)
        ctx.adapter, ctx.recorder = adapter, recorder
        return F.linear(reduced, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, A, B = ctx.saved_tensors
        wants_x, wants_A, wants_B = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            grad_reduced = (grad @ B).mul_(ctx.adapter.scale)
            grad_x = (grad_reduced @ A).to(x.dtype) if wants_x else None
            if ctx.recorder is not None:
                ctx.recorder.record(ctx.adapter, x, reduced, grad, grad_reduced)
            grad_A = _product(grad_reduced, x.to(A.dtype)) if wants_A else None
            grad_B = _product(grad, reduced) if wants_B else None
        return grad_x, grad_A, grad_B, None, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over all tokens of all examples."""
    return left.flatten(0, -2).t() @ right.flatten(0, -2)


class LoraAdapter(nn.Module):
    """x [..., I] -> (alpha / R) B A x [..., O], in float32.

    Attributes:
        given_alpha: the alpha that it was made with.
        by_root: whether `given_alpha` is divided by the root of the rank (rsLoRA).
        alpha: the number that is divided by the rank: `given_alpha`, or with `by_root` its product with that root.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        alpha: float,
        device: torch.device,
        dropout: float = 0.0,
        *,
        by_root: bool = False,
    ) -> None:
        super().__init__()
        self.given_alpha, self.by_root = alpha, by_root
        self.alpha = alpha * math.sqrt(rank) if by_root else alpha  # as dptune.peft_format reads it
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.A = nn.Linear(inputs, rank, bias=False, device=device, dtype=torch.float32)
        self.B = nn.Linear(rank, outputs, bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)
        self.replaced_weight: nn.Parameter | None = None  # the base's weight, while the adapter is merged
        self.recorder: Recorder | None = None  # only while per-example gradients are recorded

    @property
    def rank(self) -> int:
        return self.A.out_features

    @property
    def has_dropout(self) -> bool:
        """Whether its inputs are dropped in training mode."""
        return not isinstance(self.dropout, nn.Identity)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A.weight, self.B.weight
        with torch.autocast(x.device.type, enabled=False):
            if self.has_dropout:
                x = self.dropout(x.to(A.dtype))
            recorder = self.recorder if torch.is_grad_enabled() else None
            anchor = None if recorder is None else recorder.anchor(x.device)
            output: Tensor = _LowRank.apply(x, A, B, self, recorder, anchor)  # type: ignore[no-untyped-call]
            return output


class _WithLora:
    """Mixin that `attach` adds to the class of a linear layer."""

    lora: LoraAdapter

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x)  # type: ignore[misc]
        if self.lora.replaced_weight is not None:
            return output
        added: Tensor = self.lora(x)
        return output + added.to(output.dtype)


@cache
def _with_lora(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Lora{kind.__name__}", (_WithLora, kind), {})


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, with weight [I, O]. The engine does not import transformers, so by name."""
    return type(module).__name__.removeprefix("Lora") == "Conv1D" and hasattr(module, "nf")


def linear_sizes(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a layer that can be adapted."""
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of all layers of `model` that can be adapted, without the layers of adapters."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and ".lora." not in f".{name}."
    }


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def add_lora(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 16.0,
    targets: Sequence[str] = DEFAULT_TARGETS,
    dropout: float = 0.0,
    by_root: bool = False,
) -> list[str]:
    """Freeze `model` and attach an adapter to every linear layer that `targets` names.

    Args:
        model: any module; changed in place.
        rank: R, at least 1.
        alpha: above 0; the adapter's output is scaled by alpha / R.
        targets: full module names (`model.layers.0.self_attn.q_proj`), their endings (`q_proj`, `self_attn.q_proj`),
            full names with shell wildcards (`*.language_model.*.q_proj`), or ALL_LINEAR: every linear layer of the
            decoder without the output head.
        dropout: share of an adapter's inputs that is set to zero in training mode, in [0, 1).
        by_root: scale by alpha / sqrt(R) instead (rsLoRA).

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        InvalidArgument: a target matches no linear layer, the model already has adapters, or a value is out of range.
    """
    require_count("rank", rank)
    require_positive("alpha", alpha)
    if not 0 <= dropout < 1:
        refuse("dropout", dropout, "give a number of at least 0 and below 1")
    if next(adapters(model), None) is not None:
        refuse("model", type(model).__name__, "has LoRA adapters already: add them once")
    layers = linear_layers(model)
    decoder = _decoder_layers(model, layers) if ALL_LINEAR in targets else set()
    named = [target for target in targets if target != ALL_LINEAR]
    for target in named:
        if not any(_matches(name, target) for name in layers):
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers})) or "none"
            refuse("targets", target, f"matches no linear layer; the model has: {kinds}")
    chosen = [name for name in layers if name in decoder or any(_matches(name, target) for target in named)]
    if not chosen:
        refuse("targets", list(targets), "names no layer: give at least one")
    attach(model, dict.fromkeys(chosen, (rank, alpha)), dropout=dropout, by_root=by_root)
    return chosen


def _decoder_layers(model: Any, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of those of `layers` that are in the model's decoder, without the output head.

    A transformers model tells both; of any other module it is every layer.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = {id(module) for module in decoder.modules()}
    return {name for name, layer in layers.items() if id(layer) in inside and layer is not head}


def attach(
    model: nn.Module, adapted: dict[str, tuple[int, float]], *, dropout: float = 0.0, by_root: bool = False
) -> None:
    """Freeze `model` and attach an adapter to each layer of `adapted`, {full name: (rank, alpha)}; see `add_lora`."""
    model.requires_grad_(False)
    for name, (rank, alpha) in adapted.items():
        layer: Any = model.get_submodule(name)
        kind: Any = type(layer)
        inputs, outputs = linear_sizes(layer)
        layer.__class__ = _with_lora(kind)
        lora = LoraAdapter(inputs, outputs, rank, alpha, layer.weight.device, dropout, by_root=by_root)
        layer.lora = lora.train(layer.training)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraAdapter]]:
    """Yields (name of the adapted layer, its adapter), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraAdapter):
            yield name.removesuffix("lora").removesuffix("."), module


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, each once; of sharded ones, this rank's shards."""
    reshard(model)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its layer's weight, for inference at the base's speed. `unmerge_lora` undoes it exactly.

    The layer gets a new weight of the base's dtype, and the old one is kept. So a weight that is tied to another layer
    (the embedding of an adapted lm_head) does not change there.

    Raises:
        InvalidArgument: an adapter is already merged.
    """
    for name, adapter in adapters(model):
        if adapter.replaced_weight is not None:
            refuse("model", name, "its adapter is merged already")
        layer: Any = model.get_submodule(name)
        delta = adapter.scale * (adapter.B.weight @ adapter.A.weight)
        merged = layer.weight + (delta.T if is_conv1d(layer) else delta)
        adapter.replaced_weight, layer.weight = layer.weight, nn.Parameter(merged.to(layer.weight.dtype), False)


def unmerge_lora(model: nn.Module) -> None:
    """Give every merged layer its base weight back, bit for bit.

    Raises:
        InvalidArgument: an adapter is not merged.
    """
    for name, adapter in adapters(model):
        if adapter.replaced_weight is None:
            refuse("model", name, "its adapter is not merged")
        layer: Any = model.get_submodule(name)
        layer.weight, adapter.replaced_weight = adapter.replaced_weight, None


def fold_lora(model: nn.Module) -> None:
    """Merge every adapter and remove it, layer by layer: the model is plain again, and nothing undoes it.

    Memory holds one layer twice at a time. A tied weight stays as it is elsewhere, see `merge_lora`.

    Raises:
        InvalidArgument: an adapter is already merged.
    """
    for name, _ in list(adapters(model)):
        layer: Any = model.get_submodule(name)
        merge_lora(layer)
        del layer.lora
        layer.__class__ = type(layer).__bases__[1]  # see `_with_lora`
