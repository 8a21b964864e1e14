"""Rows of a large file one after another, for what needs each of them once: a million conversations stay on the disk.

`utils.files.tables` reads whole files; here JSONL is read by line and Parquet by batch. A .json file is one value and
is read whole all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from dptune._validate import refuse
from utils.files.tables import Row, json_object, read_rows

_BATCH_ROWS = 1000


def stream_rows(path: str | Path, flag: str) -> Iterator[Row]:
    """The rows of a .jsonl, .parquet or .json file in their order; errors come when they are reached.

    Args:
        path: the file.
        flag: the command-line flag that gave `path`; errors name it.

    Raises:
        InvalidArgument: the file is missing, unreadable or of another kind; names the flag, the file and the line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if not path.is_file():
        refuse(flag, str(path), "no such file; check the path")
    if reader is None:
        refuse(flag, str(path), f"unknown kind of file; give one of {', '.join(_READERS)}")
    try:
        yield from reader(path, flag)
    except UnicodeDecodeError:
        refuse(flag, str(path), "not UTF-8 text; save it as UTF-8")
    except pyarrow.ArrowException as error:
        refuse(flag, str(path), f"not a Parquet file ({type(error).__name__}); write it anew")
    except OSError as error:  # pyarrow's too, for damaged pages
        refuse(
            flag, str(path), f"cannot be read ({error.strerror or type(error).__name__}); check it, or write it anew"
        )


def _stream_jsonl(path: Path, flag: str) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield json_object(line, path, flag, number)


def _stream_parquet(path: Path, _flag: str) -> Iterator[Row]:
    """Batch by batch, lists and structs as Python's own."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            yield from batch.to_pylist()


def _whole_json(path: Path, flag: str) -> Iterator[Row]:
    yield from read_rows(path, flag)


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": _whole_json,
    ".jsonl": _stream_jsonl,
    ".parquet": _stream_parquet,
}
