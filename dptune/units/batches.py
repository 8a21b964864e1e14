"""The draw of one step (rows, or authors with the rows chosen of each), and the batches that are made of it.

Shapes: N rows, U units (rows or authors) in a micro-batch, k rows per unit, T tokens (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dptune.devices import can_pin
from dptune.sampling import PoissonSampler
from dptune.shapes import Shape
from dptune.units.unit import Authors


class Rows(Protocol):
    """A training set that makes batches of its rows."""

    @property
    def authors(self) -> Authors | None:
        """Who wrote which row; None if rows are the privacy unit."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64 [N]. Every step asks for some of them, so it is the same array each time."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, pad_token_id: int, /, width: int | None = None) -> dict[str, Tensor]:
        """A model's inputs for some rows, each [rows, T]; for no rows, a dummy row with zero loss and gradient.

        T is `width`, or else the longest row's length. The call may come from another thread than the main one, one
        call at a time. So it must draw no random numbers.
        """

    def fingerprint(self) -> str:
        """SHA-256 of the examples in order."""


@dataclass(frozen=True)
class AuthorDraw:
    """The authors of one step.

    Attributes:
        rows: for each author drawn, the numbers of the chosen rows, at least one and at most `most`; int64 arrays.
        mean: whether each row's loss is divided by the number of chosen rows of its author.
        most: k, the maximum number of rows per author: a setting, not the largest number in the draw.
        numbers: the authors' numbers as the sampler drew them, int64; by default their places in the list.
    """

    rows: list[np.ndarray]
    mean: bool
    most: int
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)


UnitDraw = np.ndarray | AuthorDraw


class AuthorSampler:
    """Poisson draws of authors, with at most `most` rows of each, chosen uniformly and anew for every draw.

    Args:
        authors: the sampler of author numbers.
        rows: the rows of every author, at least one each.
        most: k, the maximum number of rows per author and draw.
        mean: see `AuthorDraw`.
    """

    def __init__(self, authors: PoissonSampler, rows: Sequence[np.ndarray], most: int, *, mean: bool) -> None:
        if len(rows) != authors.num_examples:
            raise ValueError(f"{authors.num_examples} authors are sampled, but {len(rows)} have rows")
        self.authors, self.rows, self.most, self.mean = authors, rows, most, mean

    def draw(self) -> AuthorDraw:
        """One new draw, authors in ascending order; possibly empty."""
        drawn = self.authors.draw()
        return AuthorDraw([self._chosen(self.rows[author]) for author in drawn], self.mean, self.most, drawn)

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        return choose_rows(rows, self.most, self.authors.keystream.uniforms)  # the sampling key, which all ranks share


def choose_rows(rows: np.ndarray, most: int, numbers: Callable[[int], np.ndarray]) -> np.ndarray:
    """At most `most` of an author's rows, in order. All subsets are equally likely, no matter who else is in the data.

    Args:
        rows: the rows of one author.
        most: k, the maximum number of rows.
        numbers: n -> n independent random numbers; the positions of the smallest ones are a uniform subset.
    """
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.argsort(numbers(len(rows)))[:most])]


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass, filled up to a fixed shape with rows that have no label.

    Attributes:
        inputs: the tensors that the losses are computed from, such as "input_ids" and "labels", [U * k, T].
        rows: the places of the rows that come from the data, int64 [rows].
        items: how many of the U units come from the data; they are the first ones.
        weights: factors of the losses, float32 [U * k]; None for 1.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    items: int
    weights: Tensor | None = None

    def ready_for(self, device: torch.device) -> Batch:
        """The same in memory from which `to` copies to the device without waiting; unchanged if it has no such."""
        return self._each(Tensor.pin_memory) if can_pin(device) else self

    def to(self, device: torch.device) -> Batch:
        """The same on a device. From pinned memory, nobody waits for the copies."""
        return self._each(lambda value: value.to(device, non_blocking=can_pin(device)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed."""
        inputs = {name: change(value) for name, value in self.inputs.items()}
        weights = None if self.weights is None else change(self.weights)
        return Batch(inputs, change(self.rows), self.items, weights)


@dataclass(frozen=True)
class Part:
    """Part of a draw, which `deal_in_shapes` cuts into micro-batches.

    Attributes:
        data: the training set.
        items: the items to deal, int64: rows, or positions in `authors`.
        tokens: tokens of each item's longest row, indexed by item.
        rows_per_unit: k, the number of neighbouring rows of a batch that are clipped as one. Each view is one of them.
        authors: rows of each author by position; None if the items are rows.
        mean, numbers: see `AuthorDraw`.
        views: how often a batch holds each row, under other random masks each time. The mean over them counts.
    """

    data: Rows
    items: np.ndarray
    tokens: np.ndarray
    rows_per_unit: int = 1
    authors: Sequence[np.ndarray] | None = None
    mean: bool = False
    numbers: np.ndarray | None = None
    views: int = 1

    def numbers_of(self, items: np.ndarray) -> np.ndarray:
        """The numbers of some items as the sampler drew them."""
        return items if self.numbers is None else np.asarray(self.numbers[items])

    def batch(self, items: np.ndarray, shape: Shape, pad_token_id: int) -> Batch:
        """The batch of at most `shape.items` items, each of them whole, filled up to the shape.

        Authors with fewer than k rows, and missing items, are filled up with dummy rows of `Rows.batch`, whose gradient
        is zero.
        """
        chosen = [np.array([item]) if self.authors is None else self.authors[item] for item in items]
        counts = np.zeros(shape.items, dtype=np.int64)
        counts[: len(items)] = [self.views * len(rows) for rows in chosen]
        places = torch.from_numpy(np.flatnonzero(np.arange(self.rows_per_unit) < counts[:, None]))
        dummy = self.data.batch(np.array([], dtype=np.int64), pad_token_id, shape.width)
        inputs = {name: torch.cat([value] * shape.items * self.rows_per_unit) for name, value in dummy.items()}
        if len(items):
            for name, value in self.data.batch(np.concatenate(chosen), pad_token_id, shape.width).items():
                inputs[name][places] = value.repeat_interleave(self.views, 0)
        if self.authors is None and self.views == 1:
            return Batch(inputs, places, len(items))
        weights = row_weights(counts, self.rows_per_unit, mean=self.mean, views=self.views)
        return Batch(inputs, places, len(items), weights)


def row_weights(counts: np.ndarray, rows_per_unit: int, *, mean: bool, views: int = 1) -> Tensor:
    """What the losses of a unit's rows are multiplied by, float32 [U * k].

    Args:
        counts: rows of each unit before they are filled up, each view counted, int [U]; 0 for a unit that is filled in.
        rows_per_unit: k.
        mean: whether an author's losses add up to the mean over their rows, instead of the sum.
        views: how many of the rows are views of one row, over which the mean is taken in any case.
    """
    shares = 1 / np.maximum(counts, 1) if mean else np.full(len(counts), 1 / views)
    return torch.from_numpy(np.repeat(shares, rows_per_unit)).float()


def parts_of(draw: UnitDraw, data: Rows, views: int = 1) -> list[Part]:
    """The parts of a draw, with so many views of each row. A draw of rows is one part.

    A draw of authors has one part per number of rows, rounded up to a power of two or the maximum. So an author with
    one row is not filled up to the size of the largest author.
    """
    if not isinstance(draw, AuthorDraw):
        return [Part(data, draw, data.lengths, views, views=views)]
    if not len(draw):
        return []
    longest = np.array([data.lengths[rows].max() for rows in draw.rows])
    counts = np.array([len(rows) for rows in draw.rows])
    rounded = np.minimum(2 ** np.ceil(np.log2(counts)).astype(np.int64), draw.most)
    return [
        Part(
            data,
            np.flatnonzero(rounded == size),
            longest,
            views * int(size),
            draw.rows,
            draw.mean,
            draw.numbers,
            views,
        )
        for size in np.unique(rounded)
    ]


def rows_of(draw: UnitDraw) -> np.ndarray:
    """The numbers of all rows in a draw, int64."""
    if not isinstance(draw, AuthorDraw):
        return draw
    return np.concatenate([np.empty(0, dtype=np.int64), *draw.rows])
