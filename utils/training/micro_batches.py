"""Runs one Poisson draw through the model in micro-batches, smaller ones if memory runs out, until a stop request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dptune._files import atomic_write
from dptune._validate import HIDDEN, refuse
from dptune.devices import computes_apart
from dptune.micro_batch import Items, MicroBatchStats
from dptune.per_example import HalfAdded
from dptune.sampling import deal
from dptune.shapes import Shape, Shapes, deal_in_shapes
from dptune.units.batches import AuthorDraw, Batch, Part, Rows, UnitDraw, parts_of
from utils.cli.interruption import StopRequest
from utils.models.trainable import Losses
from utils.training.in_step import Gathers, unless_out_of_memory
from utils.training.prefetch import OneAhead
from utils.training.shared_stop import SharedStop

_NOTHING = np.empty(0, dtype=np.int64)
BUDGET_NAME = "max_tokens_per_device.json"


class Accumulates(Protocol):
    """Takes the losses of one micro-batch, or none: `PrivateRun`, or a single step."""

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1, items: Items | None = None) -> MicroBatchStats: ...

    def add_nothing(self) -> None: ...


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


@dataclass(frozen=True, eq=False)
class _Share:
    """This rank's items of one micro-batch of a draw; none if it has no more examples."""

    part: Part
    items: np.ndarray
    width: int


class _Piece(NamedTuple):
    """One forward pass: the items of a share from the position `start`, as many as `shape` holds."""

    share: _Share
    start: int
    shape: Shape

    @property
    def items(self) -> np.ndarray:
        return self.share.items[self.start : self.start + self.shape.items]


@dataclass
class MicroBatches:
    """Cuts the training set into micro-batches for this rank.

    Where an accelerator computes, a background thread makes the next batch meanwhile.

    Attributes:
        data: the whole training set.
        shapes: the shapes of all micro-batches, the same on every rank, and the number of views of each row.
        pad_token_id: token that pads rows.
        accelerator: the ranks and this rank's device.
        in_step: whether all ranks must make the same number of forward passes, because their weights are sharded.
            Then no rank can use smaller micro-batches alone. What does not fit on one rank is put off until the draw is
            through, and then dealt over all ranks again, in smaller micro-batches.
        gathers: of the sharded weights. Without it, or if it cannot catch up, a rank in step that runs out of memory
            ends the launch. So does memory that runs out while ranks send each other a sum.
        folder: the run's folder, where the budget is recorded for the next launch, if memory ran out in step.
        asked: the token budget that the user asked for; None if it is that of `shapes`.
        virtual_tokens: tokens of a soft prompt that the model puts before each row; they count in the budget.
    """

    data: Rows
    shapes: Shapes
    pad_token_id: int
    accelerator: Accelerator
    in_step: bool = False
    gathers: Gathers | None = None
    folder: Path | None = None
    asked: int | None = None
    virtual_tokens: int = 0

    def __post_init__(self) -> None:
        self._asked = self.asked or self.shapes.token_budget
        self._fitting = self.shapes  # with half the budget whenever this rank runs out of memory
        self._put_off: list[np.ndarray] = []  # items of the current draw that did not fit here, in step
        self._fits = self.shapes.token_budget  # tokens that may fit here, in step
        self._stop = SharedStop(self.accelerator.num_processes)

    def run(self, draw: UnitDraw, step: Accumulates, losses: Losses, stop: StopRequest) -> list[MicroBatchStats] | None:
        """Add the gradients of this rank's share of `draw` to `step`; every rank calls it with the same draw.

        Args:
            draw: rows, each clipped by itself, or authors with their rows, which are never split.
            step: adds all gradients of a micro-batch or none.
            losses: the loss function; returns one loss per row.
            stop: checked before each micro-batch. Of several ranks, all learn of it one micro-batch later.

        Returns:
            Statistics of each micro-batch that held an example. None if any rank was asked to stop: the step is then
            unfinished, nothing of it was released, and it must not be finished.

        Raises:
            InvalidArgument: memory is too small for a single example or author, or, with `in_step` and without
                `gathers`, for a micro-batch.
        """
        self._put_off.clear()
        seen: list[MicroBatchStats] = []
        while True:
            found = self._run_once(draw, step, losses, stop)
            if found is None:
                return None
            seen += found
            if not self.in_step:
                return seen
            draw = self._left_of(draw)
            if not len(draw):
                return seen

    def _run_once(
        self, draw: UnitDraw, step: Accumulates, losses: Losses, stop: StopRequest
    ) -> list[MicroBatchStats] | None:
        """The same, except for what is put off."""
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        shares = [
            _Share(part, dealt[rank], shape.width)
            for part in parts_of(draw, self.data, self.shapes.views)
            for shape, dealt in self._dealt(part, world_size)
        ]
        seen: list[MicroBatchStats] = []
        with OneAhead(self._batch, background=computes_apart(self.accelerator.device)) as ahead:
            for share, following in zip_longest(shares, shares[1:]):
                if self._stop.before_micro_batch(stop.pending):
                    return None
                if len(share.items):
                    seen += self._backward(share, following, ahead, step, losses)
                else:  # A dummy, as this rank has no more examples. It adds nothing, so it need not fit.
                    self._try(self._piece(share), following, ahead, step, losses)
        return None if self._stop.after_draw(stop.pending) else seen

    def _left_of(self, draw: UnitDraw) -> UnitDraw:
        """What any rank has put off, the same on every rank. If there is anything, all ranks use a smaller budget."""
        told = gather_object([(np.concatenate([_NOTHING, *self._put_off]).tolist(), self._fits)])
        self._put_off.clear()
        left = np.array(sorted(item for items, _ in told for item in items), dtype=np.int64)
        if len(left):
            self._fits = min(fits for _, fits in told)
            self.shapes = self._fitting = replace(self.shapes, token_budget=self._fits)
            if self.folder is not None and self.accelerator.is_main_process:
                remember_budget(self.folder, asked=self._asked, fits=self._fits)
            self.accelerator.print(f"out of memory: all processes continue with {self._fits} tokens at a time")
        return _only(draw, left)

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
        own = shares[self.accelerator.process_index]
        device = self.accelerator.device

        def batch_of(number: int) -> Batch:
            share = own[number]
            batch = Batch(data.batch(share, self.pad_token_id), torch.arange(len(share)), len(share))
            return batch.ready_for(device)

        with OneAhead(batch_of, background=computes_apart(device)) as ahead:
            for number, then in zip_longest(range(len(own)), range(1, len(own))):
                yield own[number], ahead.take(number, then).to(device).inputs

    def gathered(self, values: Iterable[Tensor]) -> Tensor:
        """The values of all ranks in rank order, float64 [n] on the CPU. Ranks may hold different numbers of them."""
        parts = [value.detach() for value in values]
        own = torch.cat(parts).tolist() if parts else []  # one copy from the device
        return torch.tensor(gather_object(own), dtype=torch.float64)

    def _backward(
        self, share: _Share, following: _Share | None, ahead: OneAhead[_Piece, Batch], step: Accumulates, losses: Losses
    ) -> list[MicroBatchStats]:
        """One micro-batch, in as many pieces as memory requires. Each item counts once: a piece adds all its gradients
        to the step, or none."""
        seen: list[MicroBatchStats] = []
        start = 0
        while start < len(share.items):
            piece = self._piece(share, start)
            stats = self._try(piece, following, ahead, step, losses)
            if stats is not None:
                seen.append(stats)
            elif self.in_step:
                self._put_off.append(piece.items)
            else:
                self._cut_alone(self._halved(piece))
                continue
            start += piece.shape.items
        return seen

    def _try(
        self, piece: _Piece, following: _Share | None, ahead: OneAhead[_Piece, Batch], step: Accumulates, losses: Losses
    ) -> MicroBatchStats | None:
        """Forward and backward pass of a piece, while the batch of the one after it is made; None if memory ran out.

        In step, this rank then takes part in what is left of the pass.
        """

        def run() -> MicroBatchStats:
            batch = ahead.take(piece, self._after(piece, following)).to(self.accelerator.device)
            return _backward_of(batch, piece.share.part, piece.items, step, losses(**batch.inputs))

        try:
            stats = unless_out_of_memory(run, self.accelerator.device, self.gathers)
        except HalfAdded:
            if self.in_step:
                self._end_launch(self._halved(piece))
            raise
        if stats is None and self.in_step:
            self._keep_in_step(step, self._halved(piece))
        return stats

    def _piece(self, share: _Share, start: int = 0) -> _Piece:
        """The piece that begins at this position, as large as memory allows as far as known."""
        if not len(share.items):
            return _Piece(share, start, Shape(1, share.width))
        return _Piece(share, start, self._fitting.shape(share.width, share.part.rows_per_unit, self.virtual_tokens))

    def _after(self, piece: _Piece, following: _Share | None) -> _Piece | None:
        """The piece after this one, unless memory runs out before."""
        end = piece.start + piece.shape.items
        if end < len(piece.share.items):
            return self._piece(piece.share, end)
        return None if following is None else self._piece(following)

    def _halved(self, piece: _Piece) -> int:
        """Half the tokens of a micro-batch that did not fit, so that it is cut next time."""
        part, shape = piece.share.part, piece.shape
        if not len(piece.items):
            return self.shapes.token_budget // 2
        tokens = shape.items * part.rows_per_unit * (shape.width + self.virtual_tokens)
        if shape.items == 1:
            refuse_too_large(part.rows_per_unit, tokens, authors=part.authors is not None, views=part.views)
        return tokens // 2

    def _cut_alone(self, fits: int) -> None:
        self._fitting = replace(self._fitting, token_budget=fits)
        print(f"out of memory: rank {self.accelerator.process_index} continues with {fits} tokens at a time")

    def _keep_in_step(self, step: Accumulates, fits: int) -> None:
        """Take part in the sum after a failed pass, or end the launch if this rank could not make all its gathers."""
        if self.gathers is None or not self.gathers.can_catch_up:
            self._end_launch(fits)
        self._fits = min(self._fits, fits)
        step.add_nothing()

    def _end_launch(self, fits: int) -> NoReturn:
        """Refuse to go on, and leave the smaller budget to the next launch."""
        budget = self.shapes.token_budget
        if self.folder is not None:
            remember_budget(self.folder, asked=self._asked, fits=fits)
        refuse(
            "max_tokens_per_device",
            budget,
            "out of memory, and ranks with sharded weights cannot cut one micro-batch differently; "
            f"--resume_from_checkpoint latest resumes with {fits}",
        )

    def _batch(self, piece: _Piece) -> Batch:
        batch = piece.share.part.batch(piece.items, piece.shape, self.pad_token_id)
        return batch.ready_for(self.accelerator.device)


def _backward_of(batch: Batch, part: Part, items: np.ndarray, step: Accumulates, losses: Tensor) -> MicroBatchStats:
    """The backward pass of one batch. Its statistics leave out what was filled in, and the losses are unweighted."""
    own = losses.detach()[batch.rows]  # before the backward pass: behind it nothing may run out of memory
    weighted = losses if batch.weights is None else losses * batch.weights.to(losses.dtype)
    stats = step.backward(weighted, rows_per_unit=part.rows_per_unit, items=part.numbers_of(items))
    return MicroBatchStats(own, stats.norms[: batch.items], stats.clipped[: batch.items])


def _only(draw: UnitDraw, items: np.ndarray) -> UnitDraw:
    """Some items of a draw, numbered as in its parts."""
    if not isinstance(draw, AuthorDraw):
        return items
    numbers = items if draw.numbers is None else draw.numbers[items]
    return replace(draw, rows=[draw.rows[item] for item in items], numbers=numbers)


def refuse_too_large(rows_per_item: int, tokens: int, *, authors: bool, views: int = 1) -> NoReturn:
    """Refuse the data of a single item, of so many rows (each view counted) and tokens, that does not fit in memory."""
    remedy = "shorten the examples, recompute activations, or use a launch configuration that shards the model"
    told = f"{tokens // rows_per_item} tokens"
    if views > 1:
        told, remedy = f"{told} in {views} views", f"lower --views, {remedy}"
    if not authors:
        refuse("block_size", HIDDEN, f"out of memory on a single example of {told}; {remedy}")
    what = f"out of memory on one author's {rows_per_item // views} rows of {told}"
    refuse("examples_per_unit", HIDDEN, f"{what}; lower it, {remedy}")
