"""Authors in arrays: the same numbers and the same chosen rows as with dictionaries of names, in little memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptune.units import authors as module
from dptune.units.authors import AuthorRows, by_first_appearance, chosen_rows, number_names

NAMES = st.lists(st.sampled_from([None, "a", "b", "c", "row\n1", "0", "é"]), min_size=1, max_size=40)


def numbers_by_dictionary(names: Sequence[str | None]) -> list[int]:
    """Oracle: a dictionary of names."""
    numbers: dict[str | int, int] = {}
    return [numbers.setdefault(row if name is None else name, len(numbers)) for row, name in enumerate(names)]


def kept_by_dictionary(names: Sequence[str | None], most: int, seed: int) -> list[int]:
    """Oracle: the rows with the smallest hashes of each author, as it was before authors were in arrays."""
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
    return sorted(kept + [row for theirs in ranked.values() for _, row in sorted(theirs)[:most]])


@settings(max_examples=200, deadline=None)
@given(names=NAMES, most=st.integers(1, 5), seed=st.integers(0, 3), block=st.sampled_from([1, 3, 1 << 20]))
def test_arrays_give_what_dictionaries_give(names: list[str | None], most: int, seed: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        of_row = number_names(names)
        assert of_row.dtype == np.int64
        assert of_row.tolist() == numbers_by_dictionary(names)
        keep = chosen_rows(of_row, names, most, seed)
        assert np.flatnonzero(keep).tolist() == kept_by_dictionary(names, most, seed)
        kept = [name if name is not None else f"alone {row}" for row, name in enumerate(names) if keep[row]]
        assert by_first_appearance(of_row[keep]).tolist() == numbers_by_dictionary(kept)
    rows = AuthorRows(of_row)
    assert [one.tolist() for one in rows] == [
        np.flatnonzero(of_row == author).tolist() for author in range(int(of_row.max()) + 1)
    ]
    assert [one.tolist() for one in rows[-2:]] == [one.tolist() for one in list(rows)[-2:]]
    with pytest.raises(IndexError):
        rows[len(rows)]


class ManyNames(Sequence[str | None]):
    """A name of its own for almost every row, made as it is read."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: object) -> str:
        raise AssertionError("names are read one after the other")

    def __iter__(self) -> Iterator[str]:
        return (f"somebody with a long name, number {row * 7 % (self._count - 5)}" for row in range(self._count))


def test_an_author_per_row_takes_less_than_forty_bytes_a_row() -> None:
    names = ManyNames(200_000)
    tracemalloc.start()
    try:
        of_row = number_names(names)
        numbering = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        chosen_rows(of_row, names, 1, 0)
        choosing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        AuthorRows(of_row)
        listing = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(numbering, choosing, listing) < 40 * len(names)
    assert len(np.unique(of_row)) == len(names) - 5
