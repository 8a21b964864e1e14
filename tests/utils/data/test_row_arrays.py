"""Arrays in files: what was appended is what is mapped, private, and whole or refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from dptune.units.unit import authors_of_names
from utils.data.encoding import Encoded
from utils.data.row_arrays import ArrayWriter, NameFile, Stored, create, open_arrays


def encoded(*rows: list[int]) -> Encoded:
    """Rows whose even tokens are learned."""
    ids = np.array([one for row in rows for one in row], dtype=np.int32)
    return Encoded(ids, ids % 2 == 0, np.array([len(row) for row in rows], dtype=np.int32), num_cut=len(rows) // 2)


def written(folder: Path, names: list[str | None] | None = None) -> Stored:
    with ArrayWriter(folder, "train") as writer:
        for part in (encoded([1, 2, 3], [4]), encoded(), encoded([5, 6])):
            writer.add(part)
        return writer.stored(None if names is None else authors_of_names(names))


def test_what_is_appended_is_mapped_read_only_and_outlives_its_files(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        stored = written(tmp_path)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    data = open_arrays(tmp_path, "train", stored, "--flag")
    for path in tmp_path.iterdir():
        path.unlink()
    assert data.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert data.is_answer.tolist() == [False, True, False, True, False, True]
    assert data.starts.tolist() == [0, 3, 4, 6]
    assert (data.num_cut, data.authors, data.lengths.tolist()) == (1, None, [3, 1, 2])
    with pytest.raises(ValueError, match="read-only"):
        data.ids[0] = 7


def test_authors_come_with_their_rows(tmp_path: Path) -> None:
    data = open_arrays(tmp_path, "train", written(tmp_path, ["b", None, "b"]), "--flag")
    assert data.authors is not None
    assert (data.authors.of_row.tolist(), data.authors.largest, data.authors.num_left_out) == ([0, 1, 0], 2, 0)


def test_authors_of_other_rows_are_a_mistake_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="3 examples have 2 authors"):
        written(tmp_path, ["a", "b"])


@pytest.mark.parametrize("kind", ["ids", "is_answer", "starts", "authors"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_missing_or_shortened_file_is_refused(tmp_path: Path, kind: str, cut: bool) -> None:
    stored = written(tmp_path, ["a", "b", "a"])
    path = tmp_path / f"train.{kind}"
    path.write_bytes(path.read_bytes()[:-1]) if cut else path.unlink()
    with pytest.raises(InvalidArgument, match=rf"--flag=.*train\.{kind} is missing or damaged; remove the folder"):
        open_arrays(tmp_path, "train", stored, "--flag")


def test_names_are_read_as_often_as_needed(tmp_path: Path) -> None:
    names = NameFile(tmp_path / "names")
    names.add_all(["ann", None])
    names.add_all(["é\u2028x", "0"])
    names.close()
    for _ in range(2):
        assert list(names) == ["ann", None, "é\u2028x", "0"]
    assert (len(names), "ann" in names, "bob" in names) == (4, True, False)
    names.remove()
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    create(tmp_path / "x").close()
    with pytest.raises(FileExistsError):
        create(tmp_path / "x")


def mapped_bytes(folder: Path) -> int:
    """Bytes of this process's memory that are pages of files in a folder."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:  # begins a mapping: addresses, and at the end its file
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_mapped_pages_do_not_pile_up(tmp_path: Path) -> None:
    """A page holds many rows, so that a few hundred draws would bring all of them into memory."""
    count, size = 200_000, 32
    ids, sizes = np.zeros(count * size, dtype=np.int32), np.full(count, size, dtype=np.int32)
    with ArrayWriter(tmp_path, "train") as writer:
        writer.add(Encoded(ids, np.ones(len(ids), dtype=bool), sizes, 0))
        stored = writer.stored()
    data = open_arrays(tmp_path, "train", stored, "--flag")
    assert int(data.ids.sum()) == 0  # brings all pages in
    assert mapped_bytes(tmp_path) > 2 * len(ids)
    reads = [data.fingerprint, lambda: data.num_without_answer, lambda: data.ids_until(9), lambda: data.lengths]
    chance = np.random.default_rng(0)
    for read in [*reads, *[lambda: data.batch(chance.integers(0, count, 64), 0)] * 20]:
        read()
        assert mapped_bytes(tmp_path) < len(ids) // 4
