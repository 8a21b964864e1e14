"""JSONL files: whole or not there, and read back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.files.jsonl import write_jsonl
from utils.files.tables import read_rows


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [{"instruction": "Größe?\nZwei\u2028Zeilen", "id": "1"}, {"instruction": "", "id": "2"}]
    assert write_jsonl(tmp_path / "rows.jsonl", rows) == 2
    assert read_rows(tmp_path / "rows.jsonl", "--file") == rows


def test_no_rows_are_an_empty_file(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "rows.jsonl", iter(())) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == b""


def test_an_error_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, str]]:
        yield {"id": "new"}
        raise RuntimeError("halfway")

    write_jsonl(tmp_path / "rows.jsonl", [{"id": "old"}])
    with pytest.raises(RuntimeError, match="halfway"):
        write_jsonl(tmp_path / "rows.jsonl", failing())
    assert read_rows(tmp_path / "rows.jsonl", "--file") == [{"id": "old"}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
