"""Estimates the device memory of one private step before the weights are read, and suggests settings that fit.

The estimate leaves out what CUDA and NCCL use themselves and what fragmentation wastes: `RESERVE` is kept free for
them. Sizes are in bytes; counts of tokens include padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch

from dptune._validate import refuse, require_count
from dptune.shapes import Shapes
from utils.models.quantization import BITS
from utils.models.sizes import ModelSizes

RESERVE = 1 << 30  # for workspaces of the CUDA libraries and fragmentation; assumed, not measured

_FLOAT32 = 4
_CHUNK_LOGITS = 1 << 24  # logits that dptune.losses computes at a time
_GATHERED = 1 << 26  # bytes of all ranks' shares that dptune.ranks holds at a time
# The current layer, the next one, which FSDP gathers ahead, and the buffer for receiving it.
_GATHERED_LAYERS = 3
_ADAPTER_COPIES = 5  # weight, Adam's two moments, and the clipped sum in float64; the gradient takes half its place
_SUMMED = 4  # a rank's part of the shares again, in float64: their sum, and one share on its way to it
_STEP_COPIES = 1  # the gradient beside the sum, or a temporary of the optimizer
_PLAIN_LOGIT = 12  # bytes per logit: float32, its exponential during the sum, and copies in a lower precision
_TRAINED_LOGIT = 14  # with an adapted output layer: both parts, their sum, log-probabilities
_BUDGET_STEP = 64  # tokens
_MOST_TOKENS = 1 << 24  # of one forward pass: no device has memory for more
_MOST_DEVICES = 1024


@dataclass(frozen=True)
class MemorySettings:
    """What memory depends on besides the model. None of it changes results.

    Attributes:
        dtype: data type of the frozen weights and of computation outside the adapters.
        token_budget: padded tokens in one forward pass; a single longer example gets its own pass.
        block_size: tokens of the longest example.
        checkpointing: whether each layer's activations are recomputed in the backward pass.
        world_size: processes, one per device.
        sharded: whether the frozen weights are sharded over the processes; otherwise each holds all.
        offload: whether shards are kept in the CPU's memory.
        reshard: whether a layer's gathered weights are dropped between forward and backward pass.
        bits: bits per frozen weight in the decoder layers' linear layers: 4, 8, or 16 for `dtype`.
        drawn: expected number of items (examples or authors) per step and process.
        overhead: see `dptune.shapes.Shapes`.
        rows_per_item: maximum number of examples that are clipped as one.
        views: see `dptune.shapes.Shapes`.
        chunk_tokens: tokens whose logits `dptune.losses` computes at a time; 64 on a CPU.
        keeps_average: whether an average of the trained weights is kept beside them, in float32.

    Raises:
        InvalidArgument: a count below 1, other bits, or offloading without sharding.
    """

    dtype: torch.dtype
    token_budget: int
    block_size: int
    checkpointing: bool = False
    world_size: int = 1
    sharded: bool = False
    offload: bool = False
    reshard: bool = True
    bits: int = 16
    drawn: float = 1.0
    overhead: float = Shapes.overhead
    rows_per_item: int = 1
    views: int = 1
    chunk_tokens: int = 512
    keeps_average: bool = False

    def __post_init__(self) -> None:
        for name in ("token_budget", "block_size", "world_size"):
            require_count(name, getattr(self, name))
        if self.bits not in BITS:
            refuse("bits", self.bits, f"give one of {', '.join(map(str, BITS))}")
        if self.offload and not self.sharded:
            refuse("offload", True, "only shards can be offloaded; turn sharding on")

    @property
    def micro_batches(self) -> set[tuple[int, int]]:
        """(examples, padded tokens) of every forward pass there can be."""
        shapes = Shapes(self.block_size, self.token_budget, self.drawn, overhead=self.overhead, views=self.views)
        return shapes.sizes(self.rows_per_item)


class Needs(Protocol):
    """Bytes that one device needs: a dataclass with a field for each part."""

    @property
    def host(self) -> int:
        """Bytes in the CPU's memory."""

    @property
    def total(self) -> int:
        """The peak on the device."""


NeedsWith = Callable[[MemorySettings], Needs]


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes on one device, each part at its peak. The parts do not all peak at the same time, see `total`.

    Attributes:
        frozen_weights: held throughout.
        gathered_weights: weights held whole while they compute: three layers and the root group of a sharded model,
            the largest weight of a quantised one.
        adapters: weights, their average if one is kept, and Adam's two moments in float32; the clipped sum in float64.
        activations: what the base model keeps for the backward pass.
        adapter_activations: what the adapters keep for it.
        per_example_gradients: in float32, at the end of a backward pass.
        one_layer: gradients inside a layer; with checkpointing, also its recomputed activations.
        logits: one chunk with its copies, and other tensors of the output layer.
        finish: the gradient beside the sum or the optimizer's temporaries, and what ranks exchange.
        host: in the CPU's memory: noise while it is generated, and offloaded shards.
    """

    frozen_weights: int
    gathered_weights: int
    adapters: int
    activations: int
    adapter_activations: int
    per_example_gradients: int
    one_layer: int
    logits: int
    finish: int
    host: int

    @property
    def total(self) -> int:
        """The peak on the device: what is held throughout, plus the maximum over three moments.

        During a backward pass activations are freed and per-example gradients added, layer by layer. So their sum is
        largest at its start or at its end. The third moment is the end of a step.
        """
        held = self.frozen_weights + self.gathered_weights + self.adapters
        begin = self.activations + self.adapter_activations + max(self.logits, self.one_layer)
        end = self.per_example_gradients + self.one_layer
        return held + max(begin, end, self.finish)


def memory_needs(sizes: ModelSizes, settings: MemorySettings) -> MemoryNeeds:
    """What one device needs for private steps with AdamW, in the micro-batch that needs most."""
    needs = (micro_batch_needs(sizes, settings, examples, tokens) for examples, tokens in settings.micro_batches)
    return max(needs, key=lambda one: one.total)


def micro_batch_needs(sizes: ModelSizes, settings: MemorySettings, examples: int, tokens: int) -> MemoryNeeds:
    """What one device needs for private steps with AdamW, if all micro-batches have this size."""
    itemsize = settings.dtype.itemsize
    scores = sizes.scores * sizes.heads * settings.block_size
    layer = _FLOAT32 * sizes.exact + itemsize * sizes.plain + scores
    adapter = itemsize * sizes.adapter_inputs + _FLOAT32 * sizes.adapter_own
    copied = _FLOAT32 * sizes.adapter_widest if itemsize < _FLOAT32 else 0
    one_layer = itemsize * sizes.gradients + scores + copied
    if settings.checkpointing:
        one_layer += layer + adapter // sizes.layers
        layer, adapter = itemsize * sizes.hidden, 0
    last_norm = (_FLOAT32 + itemsize) * sizes.hidden  # its input, and the gradient from the output layer
    frozen, gathered = _weights(sizes, settings)
    flat = _FLOAT32 * sizes.trained
    shares = min(_GATHERED, settings.world_size * flat) if settings.world_size > 1 else 0
    return MemoryNeeds(
        frozen_weights=0 if settings.offload else frozen,
        gathered_weights=gathered,
        adapters=(_ADAPTER_COPIES + settings.keeps_average) * flat,
        activations=tokens * (sizes.layers * layer + last_norm),
        adapter_activations=tokens * adapter,
        per_example_gradients=examples * flat,
        one_layer=tokens * one_layer,
        logits=_logits(sizes, settings, tokens),
        finish=_STEP_COPIES * flat + shares + _SUMMED * shares // settings.world_size,
        host=2 * flat + (frozen if settings.offload else 0),
    )


def device_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has left for this process; None for a CPU, whose memory is shared, and if torch cannot tell."""
    if device.type == "cpu":
        return None
    try:
        return torch.accelerator.get_memory_info(device)[0]
    except RuntimeError:  # most devices do not count their memory
        return None


def keeps_whole_sum(trained: int, available: int | None) -> bool:
    """Whether a rank with sharded trained weights has room for a step's sum of the whole model, in float64.

    It then sends its sum once per step, instead of once per micro-batch. A quarter of the free memory may go there.

    Args:
        trained: number of trained values of the whole model.
        available: bytes available on the device; None if unknown, which counts as no room.
    """
    return available is not None and 8 * trained <= available // 4


def fits(needs: Needs, available: int) -> bool:
    """Whether `available` bytes of a device are enough, with `RESERVE` kept back."""
    return needs.total + RESERVE <= available


def describe_memory(needs_with: NeedsWith, settings: MemorySettings, available: int | None) -> list[str]:
    """Printed lines: the parts, the peak and whether it fits; if it does not fit, settings that do.

    Args:
        needs_with: settings -> what one device needs with them.
        settings: the settings of the run.
        available: bytes available on the device; None if unknown.
    """
    needs = needs_with(settings)
    parts_of: Any = needs
    parts = [(one.name.replace("_", " "), getattr(needs, one.name)) for one in fields(parts_of) if one.name != "host"]
    lines = [
        f"memory per device      about {_size(needs.total)} at the peak (estimated), for at most "
        f"{max(tokens for _, tokens in settings.micro_batches):,} tokens at a time",
        f"                       largest parts, which peak at different times: "
        f"{', '.join(f'{name} {_size(size)}' for name, size in parts if 200 * size >= needs.total)}",
    ]
    if settings.offload:
        lines.append(f"memory of the CPU      about {_size(needs.host)} per process: offloaded weights and noise")
    if available is None:
        return lines
    if fits(needs, available):
        told = f"fits: the device has {_size(available)}, {_size(RESERVE)} of them for CUDA's libraries"
        return [*lines, f"                       {told}; {_room(needs_with, settings, available)}"]
    found = [f"{change} ({_size(peak)})" for change, peak in _remedies(needs_with, settings, available)]
    remedy = f"try {', or '.join(found)}" if found else "use a smaller model or --block_size: nothing else is enough"
    return [
        *lines,
        f"                       does not fit: needs {_size(needs.total)} and {_size(RESERVE)} for CUDA's libraries, "
        f"the device has {_size(available)}; {remedy}",
    ]


def largest_budget(needs_with: NeedsWith, settings: MemorySettings, available: int) -> int | None:
    """The largest token budget that fits, in steps of 64 tokens, found by bisection from the settings' own, which fits.

    None if every budget fits: then the rows that a step draws, not the budget, limit the largest micro-batch.
    """

    def enough(tokens: int) -> bool:
        return fits(needs_with(replace(settings, token_budget=tokens)), available)

    fitting = settings.token_budget
    beyond = -(-fitting // _BUDGET_STEP) * _BUDGET_STEP
    while enough(beyond):
        if beyond > _MOST_TOKENS:
            return None
        fitting, beyond = beyond, 2 * beyond
    while beyond - fitting > _BUDGET_STEP:
        middle = (fitting + beyond) // 2 // _BUDGET_STEP * _BUDGET_STEP
        fitting, beyond = (middle, beyond) if enough(middle) else (fitting, middle)
    return fitting


def _room(needs_with: NeedsWith, settings: MemorySettings, available: int) -> str:
    """Which --max_tokens_per_device fits."""
    largest = largest_budget(needs_with, settings, available)
    if largest is not None:
        return f"--max_tokens_per_device may be up to {largest}"
    most = max(tokens for _, tokens in replace(settings, token_budget=_MOST_TOKENS).micro_batches)
    return f"so does any --max_tokens_per_device: a forward pass of this batch has at most {most:,} tokens"


Change = tuple[str, MemorySettings]


def _remedies(needs_with: NeedsWith, settings: MemorySettings, available: int) -> list[tuple[str, int]]:
    """(what to change, the new peak) of settings that fit: single changes, or two or three together if one is not
    enough. Of a model without frozen linear layers, fewer bits change nothing, and so are never enough alone."""
    recompute = replace(settings, checkpointing=True)
    fewer_bits = [("--qbits 4", replace(settings, bits=4))] if settings.bits > 4 else []
    half = [("mixed_precision bf16 (or fp16) in the launch configuration", replace(settings, dtype=torch.bfloat16))]
    one_example = replace(recompute, token_budget=settings.block_size)
    flag = "" if settings.checkpointing else "--gradient_ckpt "
    rounds: list[list[Change]] = [
        [
            *([("--gradient_ckpt", recompute)] if flag else []),
            *(half if settings.dtype == torch.float32 else []),
            *fewer_bits,
            *_smaller_budget(needs_with, settings, available),
            *_more_devices(needs_with, settings, available),
        ],
        [
            *((f"{flag}{change}", replace(with_it, checkpointing=True)) for change, with_it in fewer_bits),
            *((f"{flag}{change}", with_it) for change, with_it in _smaller_budget(needs_with, recompute, available)),
            *((f"{flag}on {change}", with_it) for change, with_it in _more_devices(needs_with, recompute, available)),
        ],
        [
            (f"{flag}--max_tokens_per_device {settings.block_size} on {change}", with_it)
            for change, with_it in _more_devices(needs_with, one_example, available)
        ],
    ]
    for changes in rounds:
        needs = [(change, needs_with(changed)) for change, changed in changes]
        if fitting := [(change, then.total) for change, then in needs if fits(then, available)]:
            return fitting
    return []


def _smaller_budget(needs_with: NeedsWith, settings: MemorySettings, available: int) -> Iterator[Change]:
    """The largest smaller token budget that fits, not below the longest example, which gets its own pass."""
    below = range((settings.token_budget - 1) // _BUDGET_STEP * _BUDGET_STEP, settings.block_size, -_BUDGET_STEP)
    for tokens in [*below, settings.block_size]:
        smaller = replace(settings, token_budget=tokens)
        if fits(needs_with(smaller), available):
            yield f"--max_tokens_per_device {tokens}", smaller
            return


def _more_devices(needs_with: NeedsWith, settings: MemorySettings, available: int) -> Iterator[Change]:
    """The smallest number of devices, by doubling, that fits with sharded weights."""
    count = max(2, settings.world_size * (2 if settings.sharded else 1))
    while count <= _MOST_DEVICES:
        more = replace(settings, sharded=True, world_size=count)
        if fits(needs_with(more), available):
            yield f"{count} GPUs with accelerate_configs/accelerate_config.cfg", more
            return
        count *= 2


def _weights(sizes: ModelSizes, settings: MemorySettings) -> tuple[int, int]:
    """Bytes of (frozen weights that a rank holds, weights that it holds whole while they compute)."""
    itemsize = settings.dtype.itemsize
    # 4 bits have a float32 scale for every 64 weights; 8 bits one per row, which is negligible.
    packed = {4: 0.5 + _FLOAT32 / 64, 8: 1.0}.get(settings.bits, itemsize)
    spared = sizes.linear * (itemsize - packed)
    whole = sizes.frozen * itemsize - sizes.layers * spared
    unpacked = sizes.largest_linear * itemsize if settings.bits < 16 else 0
    if not settings.sharded:
        return int(whole), unpacked
    at_once = min(_GATHERED_LAYERS, sizes.layers) * (sizes.layer * itemsize - spared) + sizes.root * itemsize
    gathered = at_once if settings.reshard else whole
    return int(-(-whole // settings.world_size)), int(gathered) + unpacked


def _logits(sizes: ModelSizes, settings: MemorySettings, tokens: int) -> int:
    """Bytes of the output layer: one chunk of logits with its copies, and the hidden states of labelled tokens."""
    itemsize, every = settings.dtype.itemsize, tokens * sizes.vocabulary
    hidden = 2 * tokens * sizes.hidden * itemsize
    if sizes.whole_logits:
        return hidden + every * (itemsize + 3 * _FLOAT32)
    chunk = min(every, max(min(_CHUNK_LOGITS, settings.chunk_tokens * sizes.vocabulary), sizes.vocabulary))
    return hidden + chunk * (_TRAINED_LOGIT if sizes.trained_head else _PLAIN_LOGIT)


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
