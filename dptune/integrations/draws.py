"""Poisson draws for a Trainer: in a separate loader (`draw_loader`) or behind the Trainer's (`PoissonMicroBatches`).

An item of `draw_loader` is one whole draw, with this process's share cut into micro-batches. That loader must not go
through `accelerator.prepare`, which would give each process another draw for the same step.
Processes may run different numbers of micro-batches: each holds all weights, and they communicate once per step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dptune._validate import refuse
from dptune.sampling import PoissonSampler, deal

Collator = Callable[[list[Any]], Mapping[str, Tensor]]  # examples -> inputs of a micro-batch


class Examples(Protocol):
    """A training set: a list, or a data set of torch or of the datasets library that has a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> object: ...


class TrainerDraw(TypedDict):
    """One logical batch.

    Attributes:
        micro_batches: this process's share, collated.
        rows_per_unit: for each micro-batch, the number of neighbouring rows that the collator makes per item.
        items: for each micro-batch, the drawn numbers of its items.
        drawn: number of examples in the whole draw. NOT private.
    """

    micro_batches: list[Mapping[str, Tensor]]
    rows_per_unit: list[int]
    items: list[np.ndarray]
    drawn: int


class _Rows(TypedDict):
    rows: list[np.ndarray]
    rows_per_unit: list[int]
    drawn: int


class DrawSampler(Sampler[_Rows]):
    """Yields this process's share of each draw: arrays of example numbers, one per micro-batch.

    Args:
        sampler: makes the draws; the same on every process.
        micro_batch_size: maximum number of rows in one forward pass; a single example with more rows goes alone.
        rows_per_unit: rows of each example, int64 [num_examples]. All examples of a micro-batch are filled up to the
            one with the most rows, so examples with similar numbers are put together.
        steps_per_epoch: draws in one pass over the loader.
        steps_left: maximum number of draws over all passes.
        rank, world_size: this process, and the number of processes.

    Raises:
        InvalidArgument: `rows_per_unit` does not have one value per example.
    """

    def __init__(
        self,
        sampler: PoissonSampler,
        *,
        micro_batch_size: int,
        rows_per_unit: np.ndarray,
        steps_per_epoch: int,
        steps_left: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler = sampler
        self._micro_batch_size = micro_batch_size
        self._steps_per_epoch, self._steps_left = steps_per_epoch, steps_left
        self._rank, self._world_size = rank, world_size
        if len(rows_per_unit) != sampler.num_examples:
            refuse("rows_per_unit", len(rows_per_unit), f"give one for each of the {sampler.num_examples} examples")
        self._rows_per_unit = rows_per_unit

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[_Rows]:
        for _ in range(min(self._steps_per_epoch, self._steps_left)):
            self._steps_left -= 1
            draw = self._sampler.draw()
            shares = deal(draw, self._rows_per_unit, token_budget=self._micro_batch_size, ranks=self._world_size)
            own = [rows for rows in shares[self._rank] if len(rows)]
            most = [int(self._rows_per_unit[rows].max()) for rows in own]
            yield {"rows": own, "rows_per_unit": most, "drawn": len(draw)}


class _MicroBatches(Dataset[TrainerDraw]):
    """The training set with whole draws as "items", so that the loader's workers collate them."""

    def __init__(self, examples: Examples, collator: Collator) -> None:
        self._examples, self._collator = examples, collator

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, share: _Rows) -> TrainerDraw:
        micro_batches = [self._collator(fetch(self._examples, rows)) for rows in share["rows"]]
        return {
            "micro_batches": micro_batches,
            "items": share["rows"],
            "rows_per_unit": share["rows_per_unit"],
            "drawn": share["drawn"],
        }


class PoissonMicroBatches(Dataset[object]):
    """Gives a `DataLoader` the examples of the next micro-batch, no matter which items it asks for.

    Its length is not the number of examples. It makes each epoch consist of whole steps.

    Args:
        examples: the training set.
        parts: micro-batches per step.
        micro_batch_size: rows that the `DataLoader` asks for at a time.
        steps_per_epoch: steps per epoch.
    """

    def __init__(self, examples: Examples, *, parts: int, micro_batch_size: int, steps_per_epoch: int) -> None:
        self.examples, self._parts = examples, parts
        self._length = steps_per_epoch * parts * micro_batch_size
        self._sampler: PoissonSampler | None = None
        self._pending: deque[np.ndarray] = deque()
        self.handed: deque[np.ndarray] = deque()  # examples of each micro-batch handed out and not yet clipped

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> NoReturn:
        refuse("train_dataset", "privacy_engine.dataset", f"has no item {item}: let the Trainer's DataLoader read it")

    def __getitems__(self, items: list[int]) -> list[object]:
        """The examples of the next micro-batch. An empty one gives the first example, whose loss will not count."""
        if self._sampler is None:
            refuse("privacy_engine", "not started", "pass callbacks=[PrivacyEngineCallback(privacy_engine)]")
        if not self._pending:
            self._pending.extend(np.array_split(self._sampler.draw(), self._parts))
        rows = self._pending.popleft()
        self.handed.append(rows)
        return fetch(self.examples, rows if len(rows) else [0])

    def start(self, sampler: PoissonSampler) -> None:
        """Use the draws of `sampler` from now on."""
        self._sampler = sampler

    def restart(self) -> None:
        """Begin with a new draw. Examples that were only prefetched are dropped; nothing of them was released."""
        self._pending.clear()
        self.handed.clear()
        if self._sampler is not None:
            self._sampler.forget()


def fetch(examples: Examples, rows: Sequence[int] | np.ndarray) -> list[object]:
    """The examples with these numbers, read in one call if the data set supports that."""
    numbers = [int(row) for row in rows]
    if hasattr(examples, "__getitems__"):
        return list(examples.__getitems__(numbers))
    return [examples[number] for number in numbers]


def draw_loader(
    examples: Examples, collator: Collator, sampler: DrawSampler, **settings: Any
) -> DataLoader[TrainerDraw]:
    """A loader of `TrainerDraw`s.

    Args:
        examples: the training set.
        collator: list of examples -> inputs of a micro-batch.
        sampler: the draws.
        settings: arguments of `DataLoader` that change no result (workers, pinning).
    """
    draws = _MicroBatches(examples, collator)
    return DataLoader(draws, sampler=sampler, batch_size=None, collate_fn=_same, **settings)


def _same(draw: object) -> object:
    return draw
