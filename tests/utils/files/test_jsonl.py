"""JSONL files: complete or missing, and read back unchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from utils.files.jsonl import json_line, write_json, write_jsonl
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


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": math.nan}, date(2023, 8, 1), "\ud800", {1}])
def test_what_json_cannot_hold_is_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        json_line({"value": value})
    for write, content in ((write_jsonl, [{"value": value}]), (write_json, {"value": value})):
        with pytest.raises((TypeError, ValueError)):
            write(tmp_path / "file", content)
    assert list(tmp_path.iterdir()) == []


def test_a_json_file_is_indented_and_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ({"a": "old"}, {"a": "Größe\u2028", "b": [1, None]}):
        write_json(tmp_path / "a.json", content)
        assert json.loads((tmp_path / "a.json").read_text()) == content
    assert '\n  "a": "Größe' in (tmp_path / "a.json").read_text()
