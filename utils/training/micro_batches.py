"""Runs one Poisson draw through the model in micro-batches, smaller ones if memory runs out, until a stop request."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from dptune._files import atomic_write
from dptune._validate import HIDDEN, refuse
from dptune.micro_batch import Items, MicroBatchStats
from dptune.sampling import deal
from dptune.shapes import Shape, Shapes, deal_in_shapes
from dptune.units.batches import Batch, Part, Rows, UnitDraw, parts_of
from utils.cli.interruption import StopRequest
from utils.models.trainable import Losses

BUDGET_NAME = "max_tokens_per_device.json"


class Accumulates(Protocol):
    """Takes the losses of one micro-batch: `PrivateRun`, or a single step."""

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1, items: Items | None = None) -> MicroBatchStats: ...


def remember_budget(folder: Path, *, asked: int, fits: int) -> None:
    """Record for the next launch in this folder that `asked` tokens did not fit in memory, and `fits` may."""
    least = min(fits, remembered_budget(folder, asked))  # another rank may have recorded less
    with atomic_write(folder / BUDGET_NAME) as file:
        file.write(json.dumps({"asked": asked, "fits": least}) + "\n")


def remembered_budget(folder: Path, asked: int) -> int:
    """`asked`, or the smaller budget recorded by a launch that asked for the same and ran out of memory.

    If the user asks for another number than before, that number counts.
    """
    file = folder / BUDGET_NAME
    if not file.exists():
        return asked
    try:
        left = json.loads(file.read_text())
        return int(left["fits"]) if int(left["asked"]) == asked else asked
    except (ValueError, TypeError, LookupError):
        refuse("--output_dir", str(file), "is damaged; remove it")


@dataclass
class MicroBatches:
    """Cuts the training set into micro-batches for this rank.

    Attributes:
        data: the whole training set.
        shapes: the shapes of all micro-batches, the same on every rank.
        pad_token_id: token that pads rows.
        accelerator: the ranks and this rank's device.
        in_step: whether all ranks must make the same number of forward passes, because their weights are sharded.
            Then no rank can use smaller micro-batches alone: one that runs out of memory ends the launch.
        folder: the run's folder, where such a rank records the budget for the next launch.
        asked: the token budget that the user asked for; None if it is that of `shapes`.
        virtual_tokens: tokens of a soft prompt that the model puts before each row; they count in the budget.
    """

    data: Rows
    shapes: Shapes
    pad_token_id: int
    accelerator: Accelerator
    in_step: bool = False
    folder: Path | None = None
    asked: int | None = None
    virtual_tokens: int = 0

    def __post_init__(self) -> None:
        self._fitting = self.shapes  # with half the budget whenever this rank runs out of memory

    def run(self, draw: UnitDraw, step: Accumulates, losses: Losses, stop: StopRequest) -> list[MicroBatchStats] | None:
        """Add the gradients of this rank's share of `draw` to `step`; every rank calls it with the same draw.

        Args:
            draw: rows, each clipped by itself, or authors with their rows, which are never split.
            step: adds all gradients of a micro-batch or none.
            losses: the loss function; returns one loss per row.
            stop: checked before each micro-batch.

        Returns:
            Statistics of each micro-batch that held an example. None if any rank was asked to stop: the step is then
            unfinished, nothing of it was released, and it must not be finished.

        Raises:
            InvalidArgument: memory is too small for a single example or author, or, with `in_step`, for a micro-batch.
        """
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        seen: list[MicroBatchStats] = []
        for part in parts_of(draw, self.data):
            for shape, shares in self._dealt(part, world_size):
                if self._any_rank(stop.pending):
                    return None
                if len(shares[rank]):
                    seen += self._backward(part, shares[rank], shape, step, losses)
                else:  # a dummy, as this rank has no more examples
                    filling = self._batch(part, shares[rank], Shape(1, shape.width))
                    _backward_of(filling, part, shares[rank], step, losses(**filling.inputs))
        return None if self._any_rank(stop.pending) else seen

    def _dealt(self, part: Part, ranks: int) -> list[tuple[Shape, list[np.ndarray]]]:
        return deal_in_shapes(
            part.items,
            part.tokens,
            self.shapes,
            ranks=ranks,
            rows_per_item=part.rows_per_unit,
            virtual_tokens=self.virtual_tokens,
        )

    def dealt(self, data: Rows, rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """This rank's share of held-out rows: yields (rows, inputs on its device) for each forward pass.

        All ranks get the same number of passes; a rank without rows gets the dummy of `Rows.batch`.
        """
        ranks, lengths = self.accelerator.num_processes, data.lengths + self.virtual_tokens
        shares = deal(rows, lengths, token_budget=self.shapes.token_budget, ranks=ranks)
        for share in shares[self.accelerator.process_index]:
            batch = data.batch(share, self.pad_token_id)
            yield share, {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def gathered(self, values: Iterable[Tensor]) -> Tensor:
        """The values of all ranks in rank order, float64 [n] on the CPU. Ranks may hold different numbers of them."""
        parts = [value.detach() for value in values]
        own = torch.cat(parts).tolist() if parts else []  # one copy from the device
        return torch.tensor(gather_object(own), dtype=torch.float64)

    def _backward(
        self, part: Part, items: np.ndarray, shape: Shape, step: Accumulates, losses: Losses
    ) -> list[MicroBatchStats]:
        """One micro-batch, in as many pieces as memory requires. Each item counts once: a piece adds all its gradients
        to the step, or none."""
        seen: list[MicroBatchStats] = []
        while len(items):
            fitting = self._fitting.shape(shape.width, part.rows_per_unit, self.virtual_tokens)
            stats = self._try(part, items[: fitting.items], fitting, step, losses)
            if stats is None:
                self._halve(part, fitting)
            else:
                seen.append(stats)
                items = items[fitting.items :]
        return seen

    def _try(
        self, part: Part, items: np.ndarray, shape: Shape, step: Accumulates, losses: Losses
    ) -> MicroBatchStats | None:
        """None if memory ran out. Returning frees the exception, and the tensors that its traceback held."""
        try:
            batch = self._batch(part, items, shape)
            return _backward_of(batch, part, items, step, losses(**batch.inputs))
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            return None

    def _halve(self, part: Part, shape: Shape) -> None:
        """Halve the budget of the micro-batch that failed, so that it is cut next time."""
        tokens = shape.items * part.rows_per_unit * (shape.width + self.virtual_tokens)
        if shape.items == 1:
            _refuse_too_large(part, tokens)
        fits, budget = tokens // 2, self.shapes.token_budget
        self._fitting = replace(self._fitting, token_budget=fits)
        if self.in_step:
            if self.folder is not None:
                remember_budget(self.folder, asked=self.asked or budget, fits=fits)
            refuse(
                "max_tokens_per_device",
                budget,
                "out of memory, and ranks with sharded weights cannot cut one micro-batch differently; "
                f"--resume_from_checkpoint latest resumes with {fits}",
            )
        gc.collect()
        if empty_cache := getattr(torch.get_device_module(self.accelerator.device), "empty_cache", None):
            empty_cache()
        print(f"out of memory: rank {self.accelerator.process_index} continues with {fits} tokens at a time")

    def _batch(self, part: Part, items: np.ndarray, shape: Shape) -> Batch:
        return part.batch(items, shape, self.pad_token_id).to(self.accelerator.device)

    def _any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks learn it at the same micro-batch."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device)).any())


def _backward_of(batch: Batch, part: Part, items: np.ndarray, step: Accumulates, losses: Tensor) -> MicroBatchStats:
    """The backward pass of one batch. Its statistics leave out what was filled in, and the losses are unweighted."""
    own = losses.detach()[batch.rows]  # before the backward pass: behind it nothing may run out of memory
    weighted = losses if batch.weights is None else losses * batch.weights.to(losses.dtype)
    stats = step.backward(weighted, rows_per_unit=part.rows_per_unit, items=part.numbers_of(items))
    return MicroBatchStats(own, stats.norms[: batch.items], stats.clipped[: batch.items])


def _refuse_too_large(part: Part, tokens: int) -> NoReturn:
    k = part.rows_per_unit
    remedy = "shorten the examples, recompute activations, or use a launch configuration that shards the model"
    if part.authors is None:
        refuse("block_size", HIDDEN, f"out of memory on a single example of {tokens} tokens; {remedy}")
    what = f"out of memory on one author's {k} rows of {tokens // k} tokens"
    refuse("examples_per_unit", HIDDEN, f"{what}; lower it, {remedy}")
