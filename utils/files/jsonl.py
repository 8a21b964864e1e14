"""Writes JSON and JSONL files completely or not at all, and only what other programs can read as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dptune._files import atomic_write


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object per line, in UTF-8; returns the number of lines.

    The file appears, or replaces an older one, only when every row is on disk.

    Args:
        path: the file; its folder must exist.
        rows: JSON values by name. A generator is not held in memory.

    Raises:
        TypeError, ValueError, RecursionError: see `json_line`.
    """
    count = 0
    with atomic_write(path) as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007  # only the count is used
            file.write(json_line(row) + "\n")
    return count


def json_line(row: Mapping[str, object]) -> str:
    """One row as JSON, without the line end.

    Raises:
        TypeError, ValueError, RecursionError: JSON or UTF-8 cannot hold the row, which has a date, NaN, an infinite
            number or half a surrogate pair, for example.
    """
    line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
    line.encode()  # fails here, in its own row, on half a surrogate pair
    return line


def write_json(path: str | Path, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write one indented JSON value, in UTF-8. The file appears, or replaces an older one, only when complete."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def without_nan(value: object) -> object:
    """The value with None for every NaN, also inside lists and dictionaries."""
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
