"""Rows from several files as from one: their places, what each file must have, and what tells that they changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.data.pubmed import DayRange
from utils.data.sources import AbstractRows, FileRows, numbered

FLAG = "--train_file"


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_numbered_in_their_files(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", {"x": 1}, {"x": 2}), write(tmp_path / "b.jsonl", {"x": 3})
    found = [
        (Path(place.path).name, place.flag, place.row, row["x"]) for place, row in numbered(FileRows([a, b], FLAG))
    ]
    assert found == [("a.jsonl", FLAG, 1, 1), ("a.jsonl", FLAG, 2, 2), ("b.jsonl", FLAG, 1, 3)]


def test_each_file_has_rows_and_the_column_of_authors(tmp_path: Path) -> None:
    """Without the column, every row of a file would be an author of its own."""
    late = write(tmp_path / "late.jsonl", {"x": 1}, {"x": 2, "who": "ann"})
    without = write(tmp_path / "without.jsonl", {"x": 1, "user": "ann"})
    (blank := tmp_path / "blank.jsonl").write_text("\n\n")
    assert len(list(numbered(FileRows([late], FLAG), "who"))) == 2
    with pytest.raises(
        InvalidArgument, match=r"--privacy_unit='who': no such column in .*without.jsonl, which has x, user"
    ):
        list(numbered(FileRows([late, without], FLAG), "who"))
    with pytest.raises(
        InvalidArgument, match=r"--train_file='.*blank\.jsonl': is empty; give a file with at least one"
    ):
        list(numbered(FileRows([late, blank], FLAG)))


def test_a_change_of_a_file_is_a_change_of_the_state(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"x": 1})
    states = [FileRows([path], FLAG).state(), FileRows([path], FLAG, "validation").state()]
    write(path, {"x": 12})
    states.append(FileRows([path], FLAG).state())
    os.utime(path, ns=(1, 1))
    states.append(FileRows([path], FLAG).state())
    (folder := tmp_path / "folder").mkdir()
    states.append(FileRows([folder], FLAG).state())
    write(folder / "part", {"x": 1})
    states.append(FileRows([folder], FLAG).state())
    assert len({json.dumps(state) for state in states}) == len(states)
    assert json.loads(json.dumps(states)) == states


def test_abstracts_are_rows_and_only_validation_may_have_none(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"abstract": "We show."}, {"abstract": "We show."})
    write(tmp_path / "validation.jsonl", {"abstract": "late", "date": "2024-01-01"})
    days = DayRange.parse()
    assert [row for _, row in numbered(AbstractRows(tmp_path, days))] == [{"abstract": "We show."}]
    assert list(numbered(AbstractRows(tmp_path, days, held_out=True))) == []
    states = [AbstractRows(tmp_path, one).state() for one in (days, DayRange.parse("2023-08-02"))]
    assert states[0] != states[1]
