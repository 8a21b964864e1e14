"""Numbers authors and chooses their rows in arrays: a few bytes per row, however many authors there are.

A name is compared by 128 bits of its hash. Two people who share them would be one author, which only protects them
better.

Shapes: N rows, A authors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import overload

import numpy as np

_BLOCK = 1 << 16


class AuthorRows(Sequence[np.ndarray]):
    """The row numbers of each author, ascending, int64 arrays.

    Args:
        of_row: the author of each row, [N], numbered from 0; every author has a row.
    """

    def __init__(self, of_row: np.ndarray) -> None:
        self._order = _in_order(of_row)
        self._ends = np.cumsum(np.bincount(of_row))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, author: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, author: slice) -> list[np.ndarray]: ...
    def __getitem__(self, author: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(author, slice):
            return [self[one] for one in range(*author.indices(len(self)))]
        author = range(len(self))[author]
        start = int(self._ends[author - 1]) if author else 0
        return self._order[start : int(self._ends[author])].astype(np.int64)


def number_names(names: Collection[str | None]) -> np.ndarray:
    """The author of each row, int64 [N], numbered from 0 in order of first appearance.

    Args:
        names: the author's name of each row (`dptune.units.names.author_name`). A row without one has an author of its
            own. Read once.
    """
    keys = np.empty((2, len(names)), dtype=np.uint64)
    for row, name in enumerate(names):
        spelled = f"row\n{row}" if name is None else f"name\n{name}"
        keys[:, row] = np.frombuffer(hashlib.sha256(spelled.encode()).digest()[:16], dtype=np.uint64)
    order = np.lexsort(keys).astype(_width(len(names)))  # stable: rows of one author stay in order
    begins = np.ones(len(names), dtype=bool)
    for start in range(1, len(names), _BLOCK):
        here = order[start : start + _BLOCK]
        before = order[start - 1 : start - 1 + len(here)]
        begins[start : start + _BLOCK] = (keys[:, here] != keys[:, before]).any(axis=0)
    del keys
    numbers = np.empty(len(names), dtype=order.dtype)
    seen = 0
    for start in range(0, len(names), _BLOCK):
        found = seen + np.cumsum(begins[start : start + _BLOCK])
        numbers[order[start : start + _BLOCK]] = found - 1
        seen = int(found[-1])
    return by_first_appearance(numbers)


def by_first_appearance(numbers: np.ndarray) -> np.ndarray:
    """The same groups, int64 [N], numbered from 0 in the order in which they appear first.

    Args:
        numbers: the group of each row, whole numbers from 0, [N].
    """
    count = len(numbers)
    first = np.empty(int(numbers.max(initial=-1)) + 1, dtype=_width(count))
    first[numbers[::-1]] = np.arange(count - 1, -1, -1, dtype=first.dtype)  # the last one written is the first row
    is_first = np.zeros(count, dtype=bool)
    is_first[first[numbers]] = True
    place = np.cumsum(is_first, dtype=first.dtype)
    found = np.empty(count, dtype=np.int64)
    for start in range(0, count, _BLOCK):
        found[start : start + _BLOCK] = place[first[numbers[start : start + _BLOCK]]] - 1
    return found


def chosen_rows(of_row: np.ndarray, names: Collection[str | None], most: int, seed: int) -> np.ndarray:
    """Which rows stay if each author keeps at most `most`, bool [N]. A row without a name stays.

    A hash of the seed, the author's name and the row's number among theirs decides. So what is kept of one author does
    not depend on any other author.

    Args:
        of_row: the author of each row, from `number_names`.
        names: their names, read once.
        most: k, the maximum number of rows per author.
        seed: need not be secret.
    """
    number, places = _numbers_among_theirs(of_row), np.empty(len(of_row), dtype=np.uint64)
    for row, name in enumerate(names):
        digest = hashlib.sha256(f"{seed}\n{number[row]}\n{name}".encode()).digest()
        places[row] = int.from_bytes(digest[:8], "big")
    del number
    order = np.lexsort((places, of_row)).astype(_width(len(of_row)))
    del places
    keep = np.zeros(len(of_row), dtype=bool)
    keep[order[_positions(of_row) < most]] = True
    return keep


def _numbers_among_theirs(of_row: np.ndarray) -> np.ndarray:
    """The number of each row among those of its author, from 0, [N]."""
    order = _in_order(of_row)
    number = np.empty_like(order)
    number[order] = _positions(of_row)
    return number


def _positions(of_row: np.ndarray) -> np.ndarray:
    """0, 1, ... for the rows of author 0, then 0, 1, ... for those of author 1 and so on, [N]."""
    firsts = np.cumsum(np.bincount(of_row)[:-1])
    begins = np.zeros(len(of_row), dtype=_width(len(of_row)))
    begins[firsts] = firsts
    del firsts
    np.maximum.accumulate(begins, out=begins)
    positions = np.arange(len(of_row), dtype=begins.dtype)
    positions -= begins
    return positions


def _in_order(of_row: np.ndarray) -> np.ndarray:
    """The rows of author 0, then those of author 1 and so on, [N]."""
    return np.argsort(of_row, kind="stable").astype(_width(len(of_row)))


def _width(count: int) -> type[np.signedinteger]:
    """The narrowest type that numbers so many rows."""
    return np.int32 if count < 1 << 31 else np.int64
