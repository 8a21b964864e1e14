"""Whose presence is hidden: one row, or one author with all their rows; and the rows that belong to each author.

Two ways lead to author-level privacy (Charles et al. 2024, "Fine-tuning large language models with user-level
differential privacy", call them ULS and ELS). Either authors are sampled, and what an author's rows add up to is
clipped as one; or each author keeps a few rows, rows are sampled and clipped, and the accounting hides all of an
author's.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from dptune.sampling import METHOD_OF_EXAMPLES

EXAMPLE = "example"
USER_LEVEL, EXAMPLE_LEVEL = "user-level", "example-level"
USER_LEVEL_METHODS = (USER_LEVEL, EXAMPLE_LEVEL)
UNIT_GRADIENTS = ("mean", "sum")

_T = TypeVar("_T")
_WHOLE_NUMBER = re.compile(r"[+-]?\d+\.0+")  # how a column of whole numbers with a gap is often written


class Unit(Protocol):
    """What a plan and a report must know of a privacy unit."""

    @property
    def name(self) -> str:
        """Whose presence is hidden."""

    @property
    def sampled(self) -> str:
        """What is drawn, clipped and counted: a plural."""

    @property
    def how(self) -> str:
        """How a unit enters a step."""

    @property
    def group_size(self) -> int:
        """How many of what is sampled can belong to one privacy unit."""

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What a resumed run must share, as JSON values."""


@dataclass(frozen=True)
class ItemUnit:
    """A unit whose rows are all in one item of the training set, or in `group_size` items at most.

    Attributes:
        name: whose presence is hidden.
        sampled: items, in the plural.
        how: how an item enters a step.
        group_size: the largest number of items of one unit. Above 1 the accounting covers all of them together.
    """

    name: str = "one training example (one item of the data set)"
    sampled: str = "examples"
    how: str = METHOD_OF_EXAMPLES
    group_size: int = 1

    @classmethod
    def of(cls, unit: str | Unit) -> Unit:
        """A unit, or its name alone."""
        return cls(unit) if isinstance(unit, str) else unit

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What a resumed run must share, as JSON values."""
        groups: dict[str, str | int | None] = {} if self.group_size == 1 else {"group_size": self.group_size}
        return {"privacy_unit": self.name, "method": self.how} | groups


@dataclass(frozen=True)
class PrivacyUnit:
    """A unit whose rows lie scattered over the training set: what is protected, and how.

    Attributes:
        column: whose values name the authors; None where each row is a unit.
        method: one of USER_LEVEL_METHODS.
        examples: k: most rows of an author, in one step (user-level) or in the whole data set (example-level).
        gradient: how the rows of an author are put together before clipping, one of UNIT_GRADIENTS (user-level).
    """

    column: str | None = None
    method: str = USER_LEVEL
    examples: int = 1
    gradient: str = "mean"

    @property
    def samples_authors(self) -> bool:
        """Whether a step draws authors rather than rows."""
        return self.column is not None and self.method == USER_LEVEL

    @property
    def bounds_authors(self) -> bool:
        """Whether rows beyond an author's k are left out for good."""
        return self.column is not None and self.method == EXAMPLE_LEVEL

    @property
    def group_size(self) -> int:
        """How many of what is sampled can belong to one privacy unit."""
        return self.examples if self.bounds_authors else 1

    @property
    def rows_at_once(self) -> int:
        """Rows that one forward pass must hold at least: an author is never split."""
        return self.examples if self.samples_authors else 1

    @property
    def sampled(self) -> str:
        """What is drawn, clipped and counted: a plural."""
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
        if self.column is None:
            return METHOD_OF_EXAMPLES
        if self.samples_authors:
            return (
                f"user-level sampling: every author is drawn by themselves; the {self.gradient} of the gradients of up "
                f"to {self.examples} of their examples, chosen afresh each time, is clipped"
            )
        return (
            f"example-level sampling with group accounting: up to {self.examples} examples an author are kept, each is "
            "drawn and clipped by itself, and epsilon is for all of an author's together"
        )

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What a resumed run must share, as JSON values."""
        authors = self.column is not None
        return {
            "privacy_unit": self.column,
            "user_level_method": self.method if authors else None,
            "examples_per_unit": self.examples if authors else None,
            "unit_gradient": self.gradient if self.samples_authors else None,
        }


@dataclass(frozen=True)
class Authors:
    """Who wrote which row.

    Attributes:
        of_row: the author of each row that is trained on, int64 [N], numbered from 0 in order of first appearance.
        largest: rows of the author who has the most, before any were left out.
        num_left_out: rows that were left out for good.
    """

    of_row: np.ndarray
    largest: int
    num_left_out: int = 0

    def __len__(self) -> int:
        return int(self.of_row.max()) + 1

    def rows(self) -> list[np.ndarray]:
        """The rows of each author, ascending, int64."""
        order = np.argsort(self.of_row, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.of_row))[:-1])


def author_name(value: object) -> str | None:
    """The author that a cell names, or None where it names nobody (nothing, NaN, white space).

    7, 7.0, " 7 " and "7.0" are one author: formats differ in what they make of a column of numbers, and to take two
    people for one only ever protects them better.

    Raises:
        TypeError: neither text nor a number.

    >>> author_name(" ann "), author_name(7.0), author_name(""), author_name(float("nan"))
    ('ann', '7', None, None)
    """
    if value is None:
        return None
    if isinstance(value, str):
        name = value.strip()
        return name.partition(".")[0] if _WHOLE_NUMBER.fullmatch(name) else name or None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(type(value).__name__)
    if math.isnan(value):
        return None
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


def group_by_author(names: Sequence[str | None]) -> Authors:
    """Rows with one name belong together; a row without one is an author of its own.

    Args:
        names: of each row, at least one.
    """
    numbers_of: dict[str | int, int] = {}
    of_row = [numbers_of.setdefault(row if name is None else name, len(numbers_of)) for row, name in enumerate(names)]
    return Authors(np.array(of_row, dtype=np.int64), largest=int(np.bincount(of_row).max()))


def bound_authors(rows: Sequence[_T], names: Sequence[str | None], most: int, seed: int) -> tuple[list[_T], Authors]:
    """At most `most` rows of each author, in order, and who wrote them.

    Which ones is decided by hashes of the seed, the author's name and the row's number among theirs: all subsets are
    equally likely, every rank and every launch keeps the same ones, and, what the accounting rests on, what is kept of
    one author depends on nobody else. (One stream of random numbers for all would keep other rows of everybody behind
    an author who is taken out.) So the seed need not be secret.
    """
    numbered: Counter[str] = Counter()
    ranked: dict[str, list[tuple[bytes, int]]] = {}
    kept = []
    for row, name in enumerate(names):
        if name is None:
            kept.append(row)
            continue
        digest = hashlib.sha256(f"{seed}\n{numbered[name]}\n{name}".encode()).digest()
        ranked.setdefault(name, []).append((digest, row))
        numbered[name] += 1
    kept += [row for theirs in ranked.values() for _, row in sorted(theirs)[:most]]
    kept.sort()
    authors = group_by_author([names[row] for row in kept])
    largest = max(numbered.values(), default=1)
    return [rows[row] for row in kept], Authors(authors.of_row, largest, num_left_out=len(rows) - len(kept))
