"""A folder holds the rows of one run: another run is refused by what differs, and an incomplete row is skipped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.files.journal import Journal

IDENTITY = {"model": "tiny", "top_p": 0.9}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "out", "config.json", ("whole.jsonl", "part*.jsonl"), "answers")


def test_what_is_recorded_of_rows_can_be_asked(journal: Journal) -> None:
    assert journal.recorded(next(iter(IDENTITY))) is None
    journal.claim(IDENTITY)
    assert journal.recorded(next(iter(IDENTITY))) is None, "without rows the next run may be another one"
    journal.append(journal.row_files[0], {"a": 1})
    assert [journal.recorded(name) for name in (*IDENTITY, "other")] == [*IDENTITY.values(), None]


def test_rows_are_read_file_by_file_in_the_order_that_was_named(journal: Journal) -> None:
    journal.claim(IDENTITY)
    rows = [{"text": text} for text in ("two\nlines", "a\u2028b\x85c", "é 漢 🙂", "")]
    for name, row in zip(("part1.jsonl", "part0.jsonl", "whole.jsonl", "part1.jsonl"), rows, strict=True):
        journal.append(name, row)
    assert [path.name for path in journal.files()] == ["whole.jsonl", "part0.jsonl", "part1.jsonl"]
    assert list(journal.rows()) == [rows[2], rows[1], rows[0], rows[3]]


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_incomplete_row_is_skipped_and_breaks_no_other(journal: Journal, cut: int) -> None:
    journal.claim(IDENTITY)
    for text in ("first", "größ"):
        journal.append("whole.jsonl", {"a": text})
    path = journal.folder / "whole.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    torn = [] if cut > 1 else [{"a": "größ"}]
    assert list(journal.rows()) == [{"a": "first"}, *torn]
    journal.append("whole.jsonl", {"a": "after"})
    assert list(journal.rows()) == [{"a": "first"}, *torn, {"a": "after"}]


def test_a_run_resumes_in_its_folder_and_one_without_rows_does_not_count(journal: Journal) -> None:
    journal.claim({**IDENTITY, "top_p": 0.1})
    journal.claim(IDENTITY)
    assert json.loads((journal.folder / "config.json").read_text()) == IDENTITY
    journal.append("part7.jsonl", {})
    journal.claim(IDENTITY)
    journal.claim({**IDENTITY, "seed": None})  # a setting that the older run did not know
    assert json.loads((journal.folder / "config.json").read_text()) == IDENTITY


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        ({**IDENTITY, "top_p": 0.5}, r"top_p was 0\.9 and is 0\.5"),
        ({**IDENTITY, "seed": 1}, "seed was None and is 1"),
        ({"model": "tiny"}, r"top_p was 0\.9 and is None"),
        ({"model": "x" * 200, "top_p": 1}, r"model was 'tiny' and is 'x+\.\.\., top_p was 0\.9 and is 1"),
    ],
)
def test_another_run_is_refused_and_told_what_differs(journal: Journal, identity: dict, told: str) -> None:
    journal.claim(IDENTITY)
    journal.append("whole.jsonl", {})
    for refused in (journal.refuse_other_run, journal.claim):
        with pytest.raises(InvalidArgument, match=rf"^--output_dir=.*holds answers of another run \({told}\)"):
            refused(identity)
    assert json.loads((journal.folder / "config.json").read_text()) == IDENTITY


def test_a_folder_that_belongs_to_something_else_is_refused(journal: Journal) -> None:
    journal.refuse_other_run(IDENTITY)  # there is no folder yet, nor is one made
    assert not journal.folder.exists()
    journal.folder.write_text("")
    with pytest.raises(InvalidArgument, match="is a file"):
        journal.claim(IDENTITY)
    journal.folder.unlink()
    journal.folder.mkdir()
    journal.append("whole.jsonl", {})
    with pytest.raises(InvalidArgument, match=r"holds answers but no config\.json"):
        journal.claim(IDENTITY)
    for content in ("[1", "[1]"):
        (journal.folder / "config.json").write_text(content)
        with pytest.raises(InvalidArgument, match=r"its config\.json is not a JSON object"):
            journal.claim(IDENTITY)


def test_a_row_that_json_cannot_hold_is_not_written(journal: Journal) -> None:
    journal.claim(IDENTITY)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append("whole.jsonl", {"score": math.nan})
    assert journal.files() == []
