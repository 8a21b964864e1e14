"""How many rows one forward pass takes, and what else makes a training fit the memory of its devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dptune._validate import present, refuse
from utils.models.memory import MemorySettings, NeedsWith, describe_memory, fits
from utils.training.target import Target

_MOST_ROWS, _MOST_TOKENS = 16, 8192  # of one forward pass; larger ones are hardly faster


@dataclass(frozen=True)
class FittedMicroBatch:
    """How a forward pass fits the memory.

    Attributes:
        rows: rows of the maximum length.
        recompute: whether activations are recomputed in the backward pass.
        shard: whether the weights are sharded over the devices.
    """

    rows: int
    recompute: bool = False
    shard: bool = False

    def settings(self, like: MemorySettings, target: Target) -> MemorySettings:
        """What the memory depends on with it; the rest as in `like`."""
        return replace(
            like,
            token_budget=self.rows * like.block_size,
            checkpointing=self.recompute,
            sharded=self.shard,
            overhead=target.overhead(sharded=self.shard),
        )


def largest_micro_batch(needs_with: NeedsWith | None, like: MemorySettings, target: Target) -> FittedMicroBatch:
    """The most rows that fit, if possible without recomputing activations and without sharding, which take time.

    Args:
        needs_with: the memory of the model; None if it is not estimated. Then, and if the memory of the device is
            unknown, everything counts as fitting.
        like: the other settings that the memory depends on.
        target: the devices.

    Raises:
        InvalidArgument: nothing fits; the message says what would.
    """
    tried = list(_choices(like.block_size, target.processes))
    if needs_with is None or target.memory is None:
        return tried[0]
    fitting = next((one for one in tried if fits(needs_with(one.settings(like, target)), target.memory)), None)
    if fitting is None:
        told = describe_memory(needs_with, tried[-1].settings(like, target), target.memory)[-1].strip()
        refuse("for_device", present(target.named, "device").name, f"the training {told}")
    return fitting


def _choices(block_size: int, processes: int) -> Iterator[FittedMicroBatch]:
    """What to try, the fastest first."""
    most = min(_MOST_ROWS, max(1, _MOST_TOKENS // block_size))
    rows = [1 << power for power in reversed(range(most.bit_length()))]
    for shard in (False, True)[: 1 + (processes > 1)]:
        for recompute in (False, True):
            yield from (FittedMicroBatch(one, recompute, shard) for one in rows)
