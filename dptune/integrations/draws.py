"""Poisson draws for a Trainer: in a separate loader (`draw_loader`) or behind the Trainer's (`PoissonMicroBatches`).

An item of `draw_loader` is one whole draw, with this process's share cut into micro-batches. That loader must not go
through `accelerator.prepare`, which would give each process another draw for the same step.
Processes may get different numbers of micro-batches. If each holds all weights, they communicate only once per step.
With sharded weights `DPTrainer` adds empty micro-batches, so that all make the same number of passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dptune._validate import refuse
from dptune.randomness import forget_randomness, secret_seed
from dptune.sampling import PoissonSampler, deal

_NOBODY = np.array([], dtype=np.int64)

Collator = Callable[[list[Any]], Mapping[str, Tensor]]  # examples -> inputs of a micro-batch


class Examples(Protocol):
    """A training set: a list, or a data set of torch or of the datasets library that has a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> object: ...


class MicroBatch(NamedTuple):
    """The inputs of one forward pass.

    Attributes:
        inputs: U items, collated; each has k neighbouring rows.
        items: the items that come from the data, int64; they are the first ones. The rest fills up.
        units: U.
        rows_per_unit: k.
    """

    inputs: Mapping[str, Any]
    items: np.ndarray
    units: int
    rows_per_unit: int


class Cutter(Protocol):
    """Cuts items into micro-batches."""

    def __call__(self, items: Sequence[Any], rows_per_item: np.ndarray, /) -> list[MicroBatch]:
        """Micro-batches of some items, with the items' places among them.

        Args:
            items: one process's share of a draw.
            rows_per_item: number of rows that the collator makes of each, int64 [items].
        """

    def empty(self, rows: int, examples: Examples, /) -> MicroBatch:
        """The smallest micro-batch, which holds no item of a draw.

        Args:
            rows: number of rows that the collator makes of an item.
            examples: the training set.
        """


class TrainerDraw(TypedDict):
    """One logical batch.

    Attributes:
        micro_batches: this process's share, with items as the sampler numbers them.
        drawn: number of examples in the whole draw. NOT private.
    """

    micro_batches: list[MicroBatch]
    drawn: int


class _Share(TypedDict):
    items: np.ndarray
    drawn: int


class DrawSampler(Sampler[_Share]):
    """Yields this process's share of each draw, under random numbers that nobody can predict.

    A pass that ended early leaves draws that workers have prefetched. The next pass drops them and makes new ones.

    Args:
        sampler: makes the draws; the same on every process.
        steps_per_epoch: draws in one pass over the loader.
        steps_left: how many steps the run may still take, asked when a pass begins.
        rank, world_size: this process, and the number of processes.
    """

    def __init__(
        self,
        sampler: PoissonSampler,
        *,
        steps_per_epoch: int,
        steps_left: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sampler = sampler
        self._steps_per_epoch, self._steps_left = steps_per_epoch, steps_left
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[_Share]:
        self._sampler._forget()
        for _ in range(min(self._steps_per_epoch, self._steps_left())):
            draw = self._sampler.draw()
            forget_randomness()  # for the data set and the collator
            yield {"items": draw[self._rank :: self._world_size], "drawn": len(draw)}


@dataclass(frozen=True)
class LeastBatches:
    """Cuts items into as few micro-batches as fit, for training without privacy.

    Attributes:
        collate: items -> inputs of a micro-batch.
        most_rows: maximum rows of a micro-batch; a single item with more rows has its own.
    """

    collate: Collator
    most_rows: int

    def __call__(self, items: Sequence[Any], rows_per_item: np.ndarray) -> list[MicroBatch]:
        """Cut some items; those with similar numbers of rows are put together."""
        (parts,) = deal(np.arange(len(items)), rows_per_item, token_budget=self.most_rows)
        return [
            MicroBatch(self.collate([items[place] for place in part]), part, len(part), int(rows_per_item[part].max()))
            for part in parts
        ]

    def empty(self, rows: int, examples: Examples) -> MicroBatch:
        """See `Cutter`. Its row is the first item, whose loss must not count."""
        return MicroBatch(self.collate(fetch(examples, [0])), _NOBODY, 1, rows)


class _MicroBatches(Dataset[TrainerDraw]):
    """The training set with whole draws as "items", so that the loader's workers collate them."""

    def __init__(self, examples: Examples, cut: Cutter, rows_per_unit: np.ndarray) -> None:
        self._examples, self._cut, self._rows_per_unit = examples, cut, rows_per_unit

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, share: _Share) -> TrainerDraw:
        items = share["items"]
        made = self._cut(fetch(self._examples, items), self._rows_per_unit[items]) if len(items) else []
        return {"micro_batches": [one._replace(items=items[one.items]) for one in made], "drawn": share["drawn"]}


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
        forget_randomness()  # for the data set and the collator
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
            self._sampler._forget()


def fetch(examples: Examples, rows: Sequence[int] | np.ndarray) -> list[object]:
    """The examples with these numbers, read in one call if the data set supports that."""
    numbers = [int(row) for row in rows]
    if hasattr(examples, "__getitems__"):
        return list(examples.__getitems__(numbers))
    return [examples[number] for number in numbers]


def draw_loader(
    examples: Examples, cut: Cutter, sampler: DrawSampler, *, rows_per_unit: np.ndarray, **settings: Any
) -> DataLoader[TrainerDraw]:
    """A loader of `TrainerDraw`s.

    Args:
        examples: the training set.
        cut: cuts and collates the items of one process.
        sampler: the draws.
        rows_per_unit: rows of each example, int64 [num_examples].
        settings: arguments of `DataLoader` that change no result (workers, pinning).

    Raises:
        InvalidArgument: `rows_per_unit` does not have one value per example.
    """
    if len(rows_per_unit) != len(examples):
        refuse("rows_per_unit", len(rows_per_unit), f"give one for each of the {len(examples)} examples")
    draws = _MicroBatches(examples, cut, rows_per_unit)
    generator = torch.Generator().manual_seed(secret_seed())  # seeds the workers
    return DataLoader(draws, sampler=sampler, batch_size=None, collate_fn=_same, generator=generator, **settings)


def _same(draw: object) -> object:
    return draw
