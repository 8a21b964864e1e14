"""Whose presence is hidden: one row, or one author with all their rows; and which rows belong to which author.

There are two ways to author-level privacy (Charles et al. 2024, "Fine-tuning large language models with user-level
differential privacy", call them ULS and ELS). User-level: authors are sampled, and the combined gradient of an author's
rows is clipped once. Example-level: each author keeps a few rows, each row is sampled and clipped on its own, and the
accounting covers all rows of an author together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from dptune.sampling import METHOD_OF_EXAMPLES
from dptune.units.authors import AuthorRows, by_first_appearance, chosen_rows, number_names
from dptune.units.names import author_names

EXAMPLE = "example"
USER_LEVEL, EXAMPLE_LEVEL = "user-level", "example-level"
USER_LEVEL_METHODS = (USER_LEVEL, EXAMPLE_LEVEL)
UNIT_GRADIENTS = ("mean", "sum")

_T = TypeVar("_T")


class Unit(Protocol):
    """What a plan and a report must know about a privacy unit."""

    @property
    def name(self) -> str:
        """Whose presence is hidden, in words."""

    @property
    def sampled(self) -> str:
        """What is drawn, clipped and counted, in the plural: "examples" or "authors"."""

    @property
    def how(self) -> str:
        """How a unit enters a step, in words."""

    @property
    def group_size(self) -> int:
        """Maximum number of sampled examples (or authors) that belong to one unit."""

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Settings that a resumed run must share, as JSON values."""


@dataclass(frozen=True)
class ItemUnit:
    """A unit whose rows are in one item of the training set, or in at most `group_size` items.

    Attributes:
        name: whose presence is hidden, in words.
        sampled: the word for items, in the plural.
        how: how an item enters a step, in words.
        group_size: maximum number of items of one unit. Above 1, the accounting covers all of them together.
    """

    name: str = "one training example (one item of the data set)"
    sampled: str = "examples"
    how: str = METHOD_OF_EXAMPLES
    group_size: int = 1

    @classmethod
    def of(cls, unit: str | Unit) -> Unit:
        """`unit` itself, or the unit with that name and the defaults."""
        return cls(unit) if isinstance(unit, str) else unit

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Settings that a resumed run must share, as JSON values."""
        groups: dict[str, str | int | None] = {} if self.group_size == 1 else {"group_size": self.group_size}
        return {"privacy_unit": self.name, "method": self.how} | groups


@dataclass(frozen=True)
class PrivacyUnit:
    """A row, or an author whose rows are spread over the training set.

    Attributes:
        column: the column that names the author of each row; None if each row is a unit.
        method: one of USER_LEVEL_METHODS.
        examples: k, the maximum number of rows per author: in one step (user-level) or in the data set (example-level).
        gradient: how the gradients of an author's rows are combined before clipping, one of UNIT_GRADIENTS
            (user-level).
        views: how many views of each row a step takes, whose mean gradient counts as the row's.
    """

    column: str | None = None
    method: str = USER_LEVEL
    examples: int = 1
    gradient: str = "mean"
    views: int = 1

    @property
    def samples_authors(self) -> bool:
        """Whether a step draws authors instead of rows."""
        return self.column is not None and self.method == USER_LEVEL

    @property
    def bounds_authors(self) -> bool:
        """Whether an author's rows beyond k are removed from the training set."""
        return self.column is not None and self.method == EXAMPLE_LEVEL

    @property
    def group_size(self) -> int:
        """Maximum number of sampled examples (or authors) that belong to one unit."""
        return self.examples if self.bounds_authors else 1

    @property
    def rows_at_once(self) -> int:
        """Minimum number of rows, with all their views, that one forward pass must hold: an author is never split."""
        return self.examples if self.samples_authors else 1

    @property
    def sampled(self) -> str:
        """What is drawn, clipped and counted, in the plural."""
        return "authors" if self.samples_authors else "examples"

    @property
    def name(self) -> str:
        """The unit as reports name it."""
        if self.column is None:
            return "one training example (one row of the data set)"
        alone = "a row without a value is an author of its own"
        return f"one author (all rows with the same value in column {self.column}; {alone})"

    @property
    def how(self) -> str:
        """The method as reports name it."""
        views = f"; an example's gradient is the mean over {self.views} views of it" if self.views > 1 else ""
        return self._how_it_is_sampled + views

    @property
    def _how_it_is_sampled(self) -> str:
        if self.column is None:
            return METHOD_OF_EXAMPLES
        if self.samples_authors:
            return (
                f"user-level sampling: each author is drawn independently; the {self.gradient} of the gradients of up "
                f"to {self.examples} of their examples, chosen anew in each step, is clipped"
            )
        return (
            f"example-level sampling with group accounting: up to {self.examples} examples per author are kept, each "
            "is drawn and clipped on its own, and epsilon covers all examples of an author together"
        )

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Settings that a resumed run must share, as JSON values."""
        authors = self.column is not None
        return {
            "privacy_unit": self.column,
            "user_level_method": self.method if authors else None,
            "examples_per_unit": self.examples if authors else None,
            "unit_gradient": self.gradient if self.samples_authors else None,
            **({"views": self.views} if self.views > 1 else {}),
        }


@dataclass(frozen=True)
class Authors:
    """Who wrote which row.

    Attributes:
        of_row: the author of each row that is trained on, int64 [N], numbered from 0 in order of first appearance.
        largest: number of rows of the largest author, before any were left out.
        num_left_out: number of rows that were removed from the training set.
    """

    of_row: np.ndarray
    largest: int
    num_left_out: int = 0

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        return int(self.of_row.max()) + 1

    def rows(self) -> AuthorRows:
        """The row numbers of each author, ascending, int64."""
        return AuthorRows(self.of_row)


def group_by_author(names: Sequence[object]) -> Authors:
    """Number the authors. Rows with the same name have one author; each row without a name is a separate author.

    Args:
        names: the author of each row, in any spelling that `dptune.units.names.author_name` reads; at least one row.

    Raises:
        TypeError, ValueError: see `author_name`.
    """
    return authors_of_names(author_names(names))


def authors_of_names(names: Collection[str | None]) -> Authors:
    """The authors of rows with these names, as `author_name` spells them; None for a row without one."""
    of_row = number_names(names)
    return Authors(of_row, largest=int(np.bincount(of_row).max()))


def choose_of_authors(names: Collection[str | None], most: int, seed: int) -> tuple[np.ndarray, Authors]:
    """Keep at most `most` rows of each author: (which rows stay, bool [N]; who wrote them).

    A hash of the seed, the author's name and the row's number among theirs decides which rows stay. So all subsets are
    equally likely, and every rank and launch keeps the same rows. The accounting relies on this: what is kept of one
    author does not depend on any other author. With a shared stream of random numbers, removing one author would
    change the rows of all authors after them. The seed need not be secret.

    Args:
        names: as for `authors_of_names`; read twice.
        most: k, the maximum number of rows per author.
        seed: another seed keeps other rows.
    """
    of_row = number_names(names)
    keep = chosen_rows(of_row, names, most, seed)
    largest = int(np.bincount(of_row).max())
    kept = by_first_appearance(of_row[keep])
    return keep, Authors(kept, largest, num_left_out=len(of_row) - len(kept))


def bound_authors(rows: Sequence[_T], names: Sequence[object], most: int, seed: int) -> tuple[list[_T], Authors]:
    """`choose_of_authors` for rows in a list: (the kept rows in order, who wrote them). `names` as for
    `group_by_author`."""
    keep, authors = choose_of_authors(author_names(names), most, seed)
    return [row for row, kept in zip(rows, keep, strict=True) if kept], authors
