"""Large files come row by row, and damage is named by its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas
import pytest

from dptune._validate import InvalidArgument
from utils.files.row_streams import stream_rows

ROWS = [{"conversation": [{"role": "user", "content": f"Größe\u2028 {i}"}], "turn": i} for i in range(2500)]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.PARQUET"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    assert list(stream_rows(path, "--f")) == ROWS


def test_a_line_is_read_when_its_turn_comes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 5000 + "not JSON\n")
    rows: Iterator[object] = stream_rows(tmp_path / "a.jsonl", "--f")
    assert len(list(islice(rows, 4000))) == 4000
    with pytest.raises(InvalidArgument, match="line 5001 is not JSON"):
        list(rows)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.parquet", b"secret", "not a Parquet file"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.csv", b"a\n1\n", "unknown kind of file; give one of .json, .jsonl, .parquet"),
        ("a.json", b"{", "not JSON"),
    ],
)
def test_damage_is_refused_unseen(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=told) as caught:
        list(stream_rows(tmp_path / name, "--f"))
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"--f=.*no such file"):
        list(stream_rows(tmp_path / "a.jsonl", "--f"))


def test_a_file_with_damaged_pages_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    pandas.DataFrame({"text": [f"{number} of many words" for number in range(5000)]}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"^--f=.*damaged\.parquet.*write it anew"):
        list(stream_rows(path, "--f"))
