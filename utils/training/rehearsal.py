"""Runs the largest micro-batches once before training, on random tokens, and halves the token budget until they fit.

Memory that runs out in a private step costs time, and with sharded weights sometimes the launch. Here it runs out
before anything is drawn or recorded. Only settings decide what is rehearsed, so it reveals nothing about the data. The
passes go through a step that can release nothing. All random numbers are afterwards where they were.

When `train_clm.py` rehearses: with sharded weights, where no rank can cut a micro-batch alone, and wherever an
accelerator computes. A CPU has no limit of its own, and a pass takes long there, so without sharding a CPU does not
rehearse. All ranks decide together: a budget that fits on every rank is used by every rank. Without privacy, trained
shards are not rehearsed, because a rank that fails could not catch up (`utils.training.in_step`).

A pass is rehearsed beside all that a step holds: the sum of its gradients, the optimizer's moments and the average of
the weights, as shards where the weights are. Memory that runs out in the sum itself counts as well. The launch survives
it here, and only here.

Classifiers do not rehearse: they are never sharded, and a rank that runs out of memory cuts its micro-batches alone.
Evaluation is not rehearsed: it keeps no activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dptune._validate import refuse
from dptune.devices import computes_apart
from dptune.lora import trainable_parameters
from dptune.per_example import HalfAdded, RandomRow
from dptune.per_example.fixed_values import in_mode
from dptune.plain_step import PlainStep
from dptune.randomness import fixed_randomness
from dptune.run.plan import RunPlan
from dptune.shapes import Shapes
from dptune.step import PrivateStep
from utils.models.trainable import Losses
from utils.training.in_step import Gathers, unless_out_of_memory
from utils.training.micro_batches import refuse_too_large

_MOMENTS = 2  # of Adam


class PassSize(NamedTuple):
    """The size of a micro-batch: `items` of `rows_per_item` rows each, padded to `width` tokens."""

    items: int
    rows_per_item: int
    width: int

    @property
    def rows(self) -> int:
        """Rows of one forward pass."""
        return self.items * self.rows_per_item

    @property
    def tokens(self) -> int:
        """Padded tokens of one forward pass."""
        return self.rows * self.width


def is_worthwhile(device: torch.device, gathers: Gathers | None) -> bool:
    """Whether to rehearse: with shards, if a rank can catch up, and without shards on an accelerator."""
    return computes_apart(device) if gathers is None else gathers.is_steady


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal needs to run the passes of private steps without data.

    Attributes:
        model: the model; its trainable parameters are trained.
        losses: (input_ids, labels) -> one loss per row.
        plan: whether and how gradients are clipped.
        accelerator: the ranks and this rank's device.
        rows_per_item: the largest number of rows that are clipped as one, not counting views.
        loss_scale: see `PrivateStep`.
        gathers: of sharded weights; None if every rank holds the model.
        keep_whole_sum: see `PrivateStep`.
        keeps_average: whether the run keeps an average of the weights.
    """

    model: Any
    losses: Losses
    plan: RunPlan
    accelerator: Accelerator
    rows_per_item: int = 1
    loss_scale: float = 1.0
    gathers: Gathers | None = None
    keep_whole_sum: bool = False
    keeps_average: bool = False

    def settle(self, shapes: Shapes) -> Shapes:
        """`shapes`, or the same with the largest halved token budget whose micro-batches fit on every rank.

        Every rank must call this. The main process prints the result.

        Raises:
            InvalidArgument: memory is too small for a single example, or for one author's rows.
        """
        given = shapes
        with in_mode(self.model, training=True), fixed_randomness(self.accelerator.device), self._held_meanwhile():
            if self.gathers is not None:
                self._first_pass(shapes)
            while (failed := self._first_that_fails(shapes)) is not None:
                if failed.items == 1:
                    authors, views = failed.rows_per_item > shapes.views, shapes.views
                    refuse_too_large(failed.rows_per_item, failed.tokens, authors=authors, views=views)
                shapes = replace(shapes, token_budget=failed.tokens // 2)
        largest = largest_sizes(shapes, self.rows_per_item)[0]
        self.accelerator.print(_settled(largest, cut=shapes != given))
        return shapes

    def _first_pass(self, shapes: Shapes) -> None:
        """Learn the gathers of a pass from the smallest one."""
        smallest = PassSize(1, 1, int(shapes.widths[0]))
        if not self._fits_here(smallest):
            refuse_too_large(1, smallest.width, authors=False)

    def _first_that_fails(self, shapes: Shapes) -> PassSize | None:
        """The first of the largest sizes that does not fit on some rank; the same on every rank."""
        for size in largest_sizes(shapes, self.rows_per_item):
            if not all(gather_object([self._fits_here(size)])):
                return size
        return None

    def _fits_here(self, size: PassSize) -> bool:
        """Whether the memory of this rank is enough. Each size has a step of its own, which may be lost."""
        with self._step() as step:
            step.add_nothing()  # makes room for the sum

            def run() -> bool:
                ids = self._tokens(size)
                try:
                    step.backward(self.losses(input_ids=ids, labels=ids), rows_per_unit=size.rows_per_item)
                except HalfAdded:
                    return False
                return True

            if unless_out_of_memory(run, self.accelerator.device, self.gathers):
                return True
            if self.gathers is not None and not self.gathers.can_catch_up:
                refuse(
                    "max_tokens_per_device",
                    size.tokens,
                    "out of memory, and this rank cannot keep in step with the others; give a smaller budget",
                )
            step.add_nothing()  # or what is left of the sum that failed
        return False

    def _tokens(self, size: PassSize) -> Tensor:
        """Random tokens [rows, T], each of which is learned."""
        vocab_size = self.model.config.get_text_config().vocab_size
        rows = [RandomRow(size.width, number).tokens(vocab_size) for number in range(size.rows)]
        return torch.stack(rows).to(self.accelerator.device)

    @contextmanager
    def _held_meanwhile(self) -> Iterator[list[Tensor]]:
        """Holds what the optimizer will, the average, and without privacy the gradients of the micro-batches before."""
        number = _MOMENTS + self.keeps_average + (self.plan.privacy is None)
        held = [torch.empty_like(weight) for weight in trainable_parameters(self.model) for _ in range(number)]
        yield held

    def _step(self) -> PrivateStep | PlainStep:
        """A step that clips and sums as the real one does and cannot end: it has neither a ledger nor a way to meet."""
        if self.plan.privacy is None:
            return PlainStep(self.model, self.plan.expected_batch_size, loss_scale=self.loss_scale)
        return PrivateStep(
            self.model,
            self.plan.privacy,
            ledger=None,
            rank=1,
            world_size=2,
            gather=_never,
            loss_scale=self.loss_scale,
            keep_whole_sum=self.keep_whole_sum,
        )


def largest_sizes(shapes: Shapes, rows_per_item: int = 1) -> list[PassSize]:
    """The sizes of which one needs most memory, those with the most tokens first.

    Activations grow with the tokens, per-example gradients with the rows, attention scores with rows x width^2. So
    these are the sizes with the most of each, among all that the settings allow.

    Args:
        shapes: the run's shapes.
        rows_per_item: the largest number of rows per item, not counting views; items may have fewer.
    """
    counts = shapes.row_counts(rows_per_item)
    sizes = [PassSize(shapes.shape(int(width), k).items, k, int(width)) for k in counts for width in shapes.widths]
    largest = {
        max(sizes, key=lambda size: (size.tokens, size.width, size.rows_per_item)),
        max(sizes, key=lambda size: (size.rows, size.tokens, size.rows_per_item)),
        max(sizes, key=lambda size: (size.tokens * size.width, size.tokens, size.rows_per_item)),
    }
    return sorted(largest, key=lambda size: (-size.tokens, -size.width))


def _settled(size: PassSize, *, cut: bool) -> str:
    more = "; more did not, as was asked for" if cut else ""
    return f"tokens at a time       {size.tokens:,} ({size.rows} x {size.width}) fit in memory{more}"


def _never(_share: Tensor) -> Tensor:
    raise RuntimeError("a rehearsal releases nothing")
