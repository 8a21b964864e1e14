"""JSONL files written whole: all rows or none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from dptune._files import atomic_write


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object a line, in UTF-8; returns how many.

    The file appears, or takes the place of an older one, only when every row is written and on disk.

    Args:
        path: the file; its folder must exist.
        rows: JSON values by name; may be a generator, which is not held in memory.
    """
    count = 0
    with atomic_write(path) as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007  # the count is what is wanted
            file.write(json_line(row))
    return count


def json_line(row: Mapping[str, object]) -> str:
    """One row as it is written.

    Raises:
        TypeError, ValueError, RecursionError: it holds what JSON or UTF-8 does not.
    """
    line = json.dumps(dict(row), ensure_ascii=False) + "\n"
    line.encode()  # half a surrogate pair is found here, by the row that has it
    return line
