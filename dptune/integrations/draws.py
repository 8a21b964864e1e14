"""Poisson draws for a Trainer: as a loader of its own (`draw_loader`) or behind the Trainer's (`PoissonMicroBatches`).

An item of `draw_loader` is one whole draw, cut for this process into micro-batches. That loader must not go through
`accelerator.prepare`, which would give each process another draw of the same step.
Processes need not run equally many micro-batches: their weights are whole, and they meet only when a step is finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from dptune._validate import refuse
from dptune.sampling import PoissonSampler, deal

Collator = Callable[[list[Any]], Any]


class TrainerDraw(TypedDict):
    """One logical batch.

    Attributes:
        micro_batches: this process's share, collated.
        rows_per_unit: for each of them, how many neighbouring rows the collator makes of one item.
        items: for each of them, how many items it has.
        drawn: examples in the whole draw. NOT private.
    """

    micro_batches: list[Any]
    rows_per_unit: list[int]
    items: list[int]
    drawn: int


class _Rows(TypedDict):
    rows: list[np.ndarray]
    rows_per_unit: list[int]
    drawn: int


class DrawSampler(Sampler[_Rows]):
    """Yields what this process runs in each step: numbers of examples, in micro-batches.

    Args:
        sampler: makes the draws; the same on every process.
        micro_batch_size: most rows in one forward pass, where a single example has no more.
        rows_per_unit: rows of each example, int64 [num_examples]. Examples of a micro-batch are filled up to the one
            with the most, so they are put together by it; their tokens are not known.
        steps_per_epoch: draws in one pass of a loop over the loader.
        steps_left: draws after which there are no more, whatever the epoch.
        rank, world_size: which share to take.
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
    """The training set, whose "items" are draws; collated here, in the loader's workers."""

    def __init__(self, examples: Any, collator: Collator) -> None:
        self._examples, self._collator = examples, collator

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, share: Any) -> TrainerDraw:
        micro_batches = [self._collator(fetch(self._examples, rows)) for rows in share["rows"]]
        return {
            "micro_batches": micro_batches,
            "items": [len(rows) for rows in share["rows"]],
            "rows_per_unit": share["rows_per_unit"],
            "drawn": share["drawn"],
        }


class PoissonMicroBatches(Dataset[Any]):
    """Hands a `DataLoader` the examples of the next micro-batch, whichever items it asks for.

    Its length is not the number of examples but what makes each epoch whole steps of `parts` micro-batches.
    """

    def __init__(self, examples: Any, *, parts: int, micro_batch_size: int, steps_per_epoch: int) -> None:
        self.examples, self._parts = examples, parts
        self._length = steps_per_epoch * parts * micro_batch_size
        self._sampler: PoissonSampler | None = None
        self._pending: deque[np.ndarray] = deque()
        self.handed: deque[int] = deque()  # examples in each micro-batch that was handed out and not yet clipped

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> Any:
        refuse("train_dataset", "privacy_engine.dataset", f"has no item {item}: let the Trainer's DataLoader read it")

    def __getitems__(self, items: list[int]) -> list[Any]:
        """The next micro-batch's examples; the first example alone, whose loss will not count, if it has none."""
        if self._sampler is None:
            refuse("privacy_engine", "not started", "pass callbacks=[PrivacyEngineCallback(privacy_engine)]")
        if not self._pending:
            self._pending.extend(np.array_split(self._sampler.draw(), self._parts))
        rows = self._pending.popleft()
        self.handed.append(len(rows))
        return fetch(self.examples, rows if len(rows) else [0])

    def start(self, sampler: PoissonSampler) -> None:
        """Draw from now on."""
        self._sampler = sampler

    def restart(self) -> None:
        """Begin with a fresh draw: what was fetched ahead and never trained on was not released."""
        self._pending.clear()
        self.handed.clear()


def fetch(examples: Any, rows: Sequence[int] | np.ndarray) -> list[Any]:
    """The examples of these numbers, in one go where the data set can do that."""
    numbers = [int(row) for row in rows]
    if hasattr(examples, "__getitems__"):
        return list(examples.__getitems__(numbers))
    return [examples[number] for number in numbers]


def draw_loader(examples: Any, collator: Collator, sampler: DrawSampler, **settings: Any) -> DataLoader[TrainerDraw]:
    """A loader of `TrainerDraw`s; `settings` are those of `DataLoader` that change no result (workers, pinning)."""
    examples = _MicroBatches(examples, collator)
    return DataLoader(examples, sampler=sampler, batch_size=None, collate_fn=_same, **settings)


def _same(draw: Any) -> Any:
    return draw
