"""Estimates the device memory of a private step that trains every parameter of a model, whole or sharded.

Activations are those of `utils/models/sizes.py`. In addition, every trained matrix keeps its input and its output's
gradient until the norms are known, or a gradient for each example where that is smaller.

Sizes are in bytes; B examples of T tokens in one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dptune.lora import linear_layers, linear_sizes
from utils.models.memory import MemorySettings
from utils.models.sharded import decoder_layers
from utils.models.sizes import ModelSizes, model_sizes

_FLOAT32, _FLOAT64 = 4, 8
_WORTH = 2  # as in dptune.per_example.uses: a gradient for each example instead of two factors
_GATHERED_LAYERS = 3  # the current layer, the next one, which FSDP gathers ahead, and the buffer for receiving it
_MOMENTS = 2


@dataclass(frozen=True)
class WholeSizes:
    """Sizes of a model of which every parameter is trained.

    Attributes:
        base: numbers of values that the backward pass keeps.
        matrices: (inputs, outputs) of every linear layer of one decoder layer.
        inputs: values per token and decoder layer of linear layers' inputs that nothing else keeps.
        largest: values of the largest parameter.
    """

    base: ModelSizes
    matrices: tuple[tuple[int, int], ...]
    inputs: int
    largest: int

    @property
    def parameters(self) -> int:
        """Values of all parameters."""
        return self.base.frozen


@dataclass(frozen=True)
class WholeNeeds:
    """Bytes on one device, each part at its peak. The parts do not all peak at the same time, see `total`.

    Attributes:
        weights: in float32, with the optimizer's two moments, and their average if one is kept.
        gathered: weights held whole while they compute.
        summed: the step's sum in float64.
        activations: what the forward pass keeps, with the inputs of the linear layers.
        logits: the logits, whose place their gradient takes, and one chunk.
        factors: what is kept of the gradients of all examples until the norms are known.
        one_layer: gradients inside a layer; with checkpointing, also its recomputed activations.
        one_sum: sums of materialised gradients before they are added. With sharding: the sum of the largest parameter,
            what ranks send each other of it, and their total.
        finish: the gradient beside the sum.
        host: in the CPU's memory: noise while it is generated, and what is offloaded: shards, moments and sums.
    """

    weights: int
    gathered: int
    summed: int
    activations: int
    logits: int
    factors: int
    one_layer: int
    one_sum: int
    finish: int
    host: int

    @property
    def total(self) -> int:
        """The peak: what is held throughout, plus the maximum over the moments of a step."""
        begin = self.activations + self.logits
        end = self.factors + self.one_layer
        adding = self.factors + self.one_sum
        return self.weights + self.summed + max(self.gathered + max(begin, end), self.gathered + adding, self.finish)


def whole_sizes(model: Any) -> WholeSizes | None:
    """The sizes of a transformers causal language model; None if its decoder layers cannot be found."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    base = model_sizes(model)
    for parameter in trained:
        parameter.requires_grad_(True)
    if base is None:
        return None
    layer = max(decoder_layers(model), key=lambda one: sum(parameter.numel() for parameter in one.parameters()))
    return WholeSizes(
        base,
        tuple(linear_sizes(module) for module in linear_layers(layer).values()),
        _inputs(layer, base.hidden),
        max(parameter.numel() for parameter in model.parameters()),
    )


def memory_of_whole(sizes: WholeSizes, settings: MemorySettings) -> WholeNeeds:
    """What one device needs for private steps with AdamW, in the micro-batch that needs most."""
    needs = (whole_needs(sizes, settings, examples, tokens) for examples, tokens in settings.micro_batches)
    return max(needs, key=lambda one: one.total)


def whole_needs(sizes: WholeSizes, settings: MemorySettings, examples: int, tokens: int) -> WholeNeeds:
    """What one device needs for private steps with AdamW, if all micro-batches have this size.

    Args:
        sizes: the model.
        settings: `dtype` is what forward passes compute in; weights are in float32.
        examples: B.
        tokens: B T.
    """
    base, ranks = sizes.base, settings.world_size if settings.sharded else 1
    itemsize, values = settings.dtype.itemsize, sizes.parameters
    scores = base.scores * base.heads * settings.block_size
    layer = _FLOAT32 * base.exact + itemsize * (base.plain + sizes.inputs) + scores
    one_layer = itemsize * base.gradients + scores
    kept = base.layers * layer
    if settings.checkpointing:
        one_layer, kept = one_layer + layer, base.layers * itemsize * base.hidden
    head = base.vocabulary * itemsize
    factors, made = _factors(sizes, examples, tokens, itemsize)
    one_sum = _FLOAT32 * made  # of materialised gradients, which are added last
    if settings.sharded:
        one_sum = 2 * _FLOAT32 * sizes.largest + _FLOAT64 * sizes.largest // ranks
    ends = 4 * _FLOAT32 * base.hidden  # inputs of the last norm and of the output layer, and their gradients
    copies = 1 + _MOMENTS + settings.keeps_average
    held = [-(-values * size // ranks) for size in (_FLOAT32 * copies, _FLOAT64, _FLOAT32)]
    weights, summed, finish = (0, 0, 0) if settings.offload else held
    return WholeNeeds(
        weights=weights,
        gathered=_gathered(base, settings),
        summed=summed,
        activations=tokens * (kept + ends),
        logits=tokens * (head + _FLOAT32 * 2) + min(1 << 24, tokens * base.vocabulary) * _FLOAT32,
        factors=factors + tokens * head,
        one_layer=tokens * one_layer,
        one_sum=one_sum,
        finish=finish,
        host=2 * held[-1] + (sum(held) if settings.offload else 0),
    )


def _gathered(base: ModelSizes, settings: MemorySettings) -> int:
    if not settings.sharded:
        return 0
    if not settings.reshard:
        return _FLOAT32 * base.frozen
    return _FLOAT32 * (min(_GATHERED_LAYERS, base.layers) * base.layer + base.root)


def _factors(sizes: WholeSizes, examples: int, tokens: int, itemsize: int) -> tuple[int, int]:
    """(bytes of the gradients of all examples of all decoder layers, each kept in the smaller way, and of the
    embedding's; values of the matrices whose gradients are materialised)."""
    base, of_example = sizes.base, tokens // examples
    found = inputs = made = 0
    for rows, columns in sizes.matrices:
        if rows * columns <= _WORTH * of_example * (rows + columns):
            found += examples * rows * columns * _FLOAT32
            made += rows * columns
        else:
            found += tokens * columns * itemsize
            inputs = sizes.inputs * tokens * itemsize
    return base.layers * (found + inputs) + tokens * 3 * base.hidden * _FLOAT32, base.layers * made


def _inputs(layer: nn.Module, hidden: int) -> int:
    """Values per token of the input of q, k and v, of the MLP's first layers, and of its last one."""
    linears = (linear_sizes(module) for module in linear_layers(layer).values())
    return 2 * hidden + max((inputs for inputs, outputs in linears if outputs == hidden), default=0)


def bytes_sent_whole(sizes: WholeSizes, ranks: int, micro_batches: int) -> int:
    """Bytes that one rank sends per step with sharded weights, if it sends each micro-batch's sum.

    A micro-batch gathers every layer twice, forward and backward, and the root group once. Then each rank gets the sums
    of its rows.
    """
    base = sizes.base
    gathered = 2 * (base.frozen - base.root) + base.root
    return micro_batches * _FLOAT32 * (gathered + sizes.parameters) * (ranks - 1) // ranks
