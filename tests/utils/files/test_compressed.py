"""Compressed files are read as what they hold, and damaged ones are errors."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest

from utils.files.compressed import COMPRESSIONS, kind_of_file, open_text

TEXT = "\ufeffé one\r\ntwo\n" * 2000


def write(path: Path, text: str = TEXT) -> Path:
    compression = COMPRESSIONS.get(path.suffix)
    with pyarrow.output_stream(str(path), compression=compression) as file:
        file.write(text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_text_is_read_as_it_stands(name: str, tmp_path: Path) -> None:
    with open_text(write(tmp_path / name)) as file:
        assert file.read() == TEXT.removeprefix("\ufeff")


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_file_that_was_cut_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.csv{suffix}")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError), open_text(path) as file:  # noqa: PT011  # pyarrow's message
        file.read()
    path.write_text("not compressed")
    with pytest.raises(OSError), open_text(path) as file:  # noqa: PT011
        file.read()


def test_the_kind_is_that_of_the_content_and_of_the_compression() -> None:
    assert [kind_of_file(Path(name)) for name in ("a.b.csv", "A.JSON.GZ", "x.gz", "x", "d/x.tsv.zst")] == [
        ".csv",
        ".json.gz",
        ".gz",
        "",
        ".tsv.zst",
    ]
