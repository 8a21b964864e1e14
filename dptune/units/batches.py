"""One step's draw as what is dealt over ranks and micro-batches: rows, or authors with the rows chosen of each.

Shapes: U authors of a micro-batch, k rows for each of them, T tokens (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dptune.losses import IGNORE
from dptune.sampling import PoissonSampler
from dptune.units.unit import Authors


class Rows(Protocol):
    """A training set that gives batches of its rows."""

    @property
    def authors(self) -> Authors | None:
        """Who wrote which row; None where rows are the privacy unit."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [N]."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, pad_token_id: int, /) -> dict[str, Tensor]:
        """What a model is given for some rows; for none at all a dummy row whose loss and gradient are zero."""

    def fingerprint(self) -> str:
        """SHA-256 over the examples in order."""


@dataclass(frozen=True)
class AuthorDraw:
    """The authors of one step.

    Attributes:
        rows: of each author drawn, the rows that were chosen, at least one.
        mean: whether a row's loss is divided by how many rows its author has here.
    """

    rows: list[np.ndarray]
    mean: bool

    def __len__(self) -> int:
        return len(self.rows)


UnitDraw = np.ndarray | AuthorDraw


class AuthorSampler:
    """Poisson draws of authors, and of each one drawn at most `most` rows, uniformly, afresh every time.

    Args:
        authors: draws numbers of authors.
        rows: of every author, at least one each.
        most: k.
        mean: see `AuthorDraw`.
    """

    def __init__(self, authors: PoissonSampler, rows: Sequence[np.ndarray], most: int, *, mean: bool) -> None:
        if len(rows) != authors.num_examples:
            raise ValueError(f"{authors.num_examples} authors are sampled, but {len(rows)} have rows")
        self.authors, self.rows, self.most, self.mean = authors, rows, most, mean

    def draw(self) -> AuthorDraw:
        """One fresh draw, authors ascending; possibly none."""
        return AuthorDraw([self._chosen(self.rows[author]) for author in self.authors.draw()], self.mean)

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        return choose_rows(rows, self.most, self.authors.keystream.uniforms)  # the sampling key, which all ranks share


def choose_rows(rows: np.ndarray, most: int, numbers: Callable[[int], np.ndarray]) -> np.ndarray:
    """At most `most` of an author's rows, in order. All subsets are equally likely, whoever else is in the data.

    Args:
        rows: of one author.
        most: k.
        numbers: n -> n independent random numbers; the places of the smallest ones are a uniform subset.
    """
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.argsort(numbers(len(rows)))[:most])]


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        inputs: what the losses are computed from, such as "input_ids" and "labels", [U * k, T].
        weights: what the losses are multiplied by, float32 [U * k]; None for 1.
        is_row: which rows are of the data rather than filled in, bool [U * k]; None for all.
    """

    inputs: dict[str, Tensor]
    weights: Tensor | None = None
    is_row: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Part of a draw: what `deal` cuts into micro-batches.

    Attributes:
        data: the training set.
        items: to be dealt, int64: rows, or positions in `authors`.
        lengths: padded tokens of an item alone, by item.
        rows_per_unit: k: neighbouring rows of a batch that are clipped as one.
        authors: rows of each author by position; None where the items are rows.
        mean: see `AuthorDraw`.
    """

    data: Rows
    items: np.ndarray
    lengths: np.ndarray
    rows_per_unit: int = 1
    authors: Sequence[np.ndarray] | None = None
    mean: bool = False

    def batch(self, items: np.ndarray, pad_token_id: int) -> Batch:
        """Some items, none of them cut; none at all give the dummy of `Rows.batch`."""
        if self.authors is None or not len(items):
            return Batch(self.data.batch(items, pad_token_id))
        return self._of_authors([self.authors[item] for item in items], pad_token_id)

    def _of_authors(self, chosen: list[np.ndarray], pad_token_id: int) -> Batch:
        """An author with fewer than k rows is filled up with rows that have no label: their gradient is zero."""
        counts = np.array([len(rows) for rows in chosen])
        is_row = torch.from_numpy((np.arange(self.rows_per_unit) < counts[:, None]).flatten())
        rows = self.data.batch(np.concatenate(chosen), pad_token_id)
        inputs = {}
        for name, filling in (("input_ids", pad_token_id), ("labels", IGNORE)):
            inputs[name] = torch.full((len(is_row), rows[name].shape[1]), filling, dtype=torch.int64)
            inputs[name][is_row] = rows[name]
        shares = 1 / counts if self.mean else np.ones(len(counts))
        return Batch(inputs, torch.from_numpy(np.repeat(shares, self.rows_per_unit)).float(), is_row)


def parts_of(draw: UnitDraw, data: Rows) -> list[Part]:
    """A draw of rows is one part. Of authors there is one for each number of rows, rounded up to a power of two, so
    that an author with one row is not filled up to as many as another one has."""
    if not isinstance(draw, AuthorDraw):
        return [Part(data, draw, data.lengths)]
    if not len(draw):
        return []
    longest = np.array([data.lengths[rows].max() for rows in draw.rows])
    counts = np.array([len(rows) for rows in draw.rows])
    rounded = np.minimum(2 ** np.ceil(np.log2(counts)).astype(np.int64), counts.max())
    return [
        Part(data, np.flatnonzero(rounded == size), int(size) * longest, int(size), draw.rows, draw.mean)
        for size in np.unique(rounded)
    ]


def rows_of(draw: UnitDraw) -> np.ndarray:
    """All rows that a draw puts through the model, int64."""
    if not isinstance(draw, AuthorDraw):
        return draw
    return np.concatenate([np.empty(0, dtype=np.int64), *draw.rows])
