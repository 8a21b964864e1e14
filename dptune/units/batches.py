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

from dptune.losses import IGNORE
from dptune.sampling import PoissonSampler
from dptune.units.unit import Authors


class Rows(Protocol):
    """A training set that makes batches of its rows."""

    @property
    def authors(self) -> Authors | None:
        """Who wrote which row; None if rows are the privacy unit."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64 [N]."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, pad_token_id: int, /) -> dict[str, Tensor]:
        """A model's inputs for some rows, each [rows, T]; for no rows, a dummy row with zero loss and gradient."""

    def fingerprint(self) -> str:
        """SHA-256 of the examples in order."""


@dataclass(frozen=True)
class AuthorDraw:
    """The authors of one step.

    Attributes:
        rows: for each author drawn, the numbers of the chosen rows, at least one; int64 arrays.
        mean: whether each row's loss is divided by the number of chosen rows of its author.
    """

    rows: list[np.ndarray]
    mean: bool

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
        return AuthorDraw([self._chosen(self.rows[author]) for author in self.authors.draw()], self.mean)

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
    """The inputs of one forward pass.

    Attributes:
        inputs: the tensors that the losses are computed from, such as "input_ids" and "labels", [U * k, T].
        weights: factors of the losses, float32 [U * k]; None for 1.
        is_row: which rows come from the data and are not filled in, bool [U * k]; None for all.
    """

    inputs: dict[str, Tensor]
    weights: Tensor | None = None
    is_row: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Part of a draw, which `deal` cuts into micro-batches.

    Attributes:
        data: the training set.
        items: the items to deal, int64: rows, or positions in `authors`.
        lengths: padded tokens of each item alone, indexed by item.
        rows_per_unit: k, the number of neighbouring rows of a batch that are clipped as one.
        authors: rows of each author by position; None if the items are rows.
        mean: see `AuthorDraw`.
    """

    data: Rows
    items: np.ndarray
    lengths: np.ndarray
    rows_per_unit: int = 1
    authors: Sequence[np.ndarray] | None = None
    mean: bool = False

    def batch(self, items: np.ndarray, pad_token_id: int) -> Batch:
        """The batch of some items, each of them whole; for no items, the dummy of `Rows.batch`."""
        if self.authors is None or not len(items):
            return Batch(self.data.batch(items, pad_token_id))
        return self._of_authors([self.authors[item] for item in items], pad_token_id)

    def _of_authors(self, chosen: list[np.ndarray], pad_token_id: int) -> Batch:
        """Authors with fewer than k rows are filled up with rows that have no label, whose gradient is zero."""
        counts = np.array([len(rows) for rows in chosen])
        is_row = torch.from_numpy((np.arange(self.rows_per_unit) < counts[:, None]).flatten())
        rows = self.data.batch(np.concatenate(chosen), pad_token_id)
        inputs = {}
        for name, filling in (("input_ids", pad_token_id), ("labels", IGNORE)):
            inputs[name] = torch.full((len(is_row), rows[name].shape[1]), filling, dtype=torch.int64)
            inputs[name][is_row] = rows[name]
        return Batch(inputs, row_weights(counts, self.rows_per_unit, mean=self.mean), is_row)


def row_weights(counts: np.ndarray, rows_per_unit: int, *, mean: bool) -> Tensor:
    """What the losses of authors' rows are multiplied by, float32 [U * k].

    Args:
        counts: rows of each author before they are filled up, int [U].
        rows_per_unit: k.
        mean: whether an author's losses add up to the mean over their rows, instead of the sum.
    """
    shares = 1 / counts if mean else np.ones(len(counts))
    return torch.from_numpy(np.repeat(shares, rows_per_unit)).float()


def parts_of(draw: UnitDraw, data: Rows) -> list[Part]:
    """The parts of a draw. A draw of rows is one part.

    A draw of authors has one part per number of rows, rounded up to a power of two. So an author with one row is not
    filled up to the size of the largest author.
    """
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
    """The numbers of all rows in a draw, int64."""
    if not isinstance(draw, AuthorDraw):
        return draw
    return np.concatenate([np.empty(0, dtype=np.int64), *draw.rows])
