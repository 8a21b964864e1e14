"""Files of rows: JSON, JSONL, CSV, Parquet and saved `datasets` folders, each read into a list of dictionaries.

Every format is read in place. `datasets.load_dataset` would do all of them, but it leaves a converted copy of what may
be private text in a cache in the home directory; `datasets.load_from_disk` maps the folder itself and copies nothing.
Errors name the flag, the file and the row or line. They never show what a row holds: error messages end up in logs.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptune._validate import InvalidArgument, refuse

if TYPE_CHECKING:  # programs import this module before they parse their flags: it loads libraries when it reads
    import datasets

Row = dict[str, object]
SPLITS = {"train": ("train",), "validation": ("validation", "val")}
_LONGEST_COLUMN_NAME = 40


def read_rows(path: str | Path, flag: str, split: str = "train") -> list[Row]:
    """All rows of a file, or of one split of a folder that `DatasetDict.save_to_disk` wrote.

    Args:
        path: a .json, .jsonl, .csv or .parquet file, or a folder.
        flag: the command-line flag that gave `path`; errors name it.
        split: "train" or "validation"; a file is read whole whichever it is.

    Returns:
        At least one row, in file order. JSON dictionaries of equally long lists become rows too.

    Raises:
        InvalidArgument: the file is missing, empty, unreadable or of an unknown kind, or the folder has no such split.
    """
    path = Path(path)
    if not path.exists():
        refuse(flag, str(path), "no such file or folder; check the path")
    rows = _read_folder(path, flag, split) if path.is_dir() else _read_file(path, flag)
    if not rows:
        refuse(flag, str(path), "there are no rows in it; give a file with at least one")
    return rows


def has_validation_split(path: str | Path, flag: str) -> bool:
    """Whether `path` is a saved DatasetDict with a split for validation."""
    path = Path(path)
    if not path.is_dir():
        return False
    import datasets

    saved = _load_folder(path, flag)
    return isinstance(saved, datasets.DatasetDict) and any(name in saved for name in SPLITS["validation"])


def show_columns(names: Iterable[object]) -> str:
    """Column names for an error message; what does not look like a name may be a record (a CSV without its header)."""
    shown = [
        n if isinstance(n, str) and n.isidentifier() and len(n) <= _LONGEST_COLUMN_NAME else "(name not shown)"
        for n in names
    ]
    return ", ".join(shown) or "none"


def _read_jsonl(path: Path, flag: str) -> list[Row]:
    """One JSON object a line; blank lines are passed over."""
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(json_object(line, path, flag, number))
    return rows


def json_object(line: str, path: Path, flag: str, number: int) -> Row:
    """One line of a JSONL file; anything but an object is refused by its number."""
    try:
        row = parse_json(line)
    except json.JSONDecodeError as error:
        refuse(flag, str(path), f"line {number} is not JSON ({error.msg}); put one whole JSON object on each line")
    if not isinstance(row, dict):
        refuse(flag, str(path), f"line {number} is not a JSON object; put one {{...}} on each line")
    return row


def parse_json(text: str) -> Any:
    """`json.loads`, which raises JSONDecodeError alone: also for what is JSON, but more than Python takes."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        raise json.JSONDecodeError("a number of thousands of digits, or nested too deeply", "", 0) from None


def _read_file(path: Path, flag: str) -> list[Row]:
    """Dispatch on the suffix; turns what the operating system or the decoder refuses into one line."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        refuse(flag, str(path), f"unknown kind of file; give one of {', '.join(_READERS)}, or a saved DatasetDict")
    if path.stat().st_size == 0:
        refuse(flag, str(path), "the file is empty; give one with at least one row")
    try:
        return reader(path, flag)
    except UnicodeDecodeError:
        refuse(flag, str(path), "not UTF-8 text; save it as UTF-8")
    except OSError as error:
        refuse(flag, str(path), f"cannot be read ({error.strerror or type(error).__name__}); check its permissions")


def _read_json(path: Path, flag: str) -> list[Row]:
    """A dictionary of columns, or a list of rows."""
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"not JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        refuse(flag, str(path), f"{where}; mend it, or name it .jsonl if it has one object a line")
    if isinstance(content, dict):
        return _columns_to_rows(content, path, flag)
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        refuse(flag, str(path), "must hold a dictionary of lists, or a list of dictionaries (one a row)")
    return content


def _columns_to_rows(columns: dict[str, object], path: Path, flag: str) -> list[Row]:
    """{"instruction": [...], "answer": [...]} -> [{"instruction": ..., "answer": ...}, ...]."""
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    if len(lists) < len(columns):
        bad = show_columns(name for name in columns if name not in lists)
        refuse(flag, str(path), f"every value of the dictionary must be a list, but not so for: {bad}")
    sizes = {name: len(values) for name, values in lists.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{show_columns([name])} has {size}" for name, size in sizes.items())
        refuse(flag, str(path), f"lists of unequal length ({told}); give each row a value in every list")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _read_csv(path: Path, flag: str) -> list[Row]:
    """Comma-separated with a header line, every value a string ("NA" too).

    The standard library rather than pandas, which takes a surplus first column for an index and shifts the others in
    silence. Here a surplus value is refused, and a missing one is None, which `records` refuses by row.
    """
    limit = csv.field_size_limit(sys.maxsize)  # the default of 131,072 characters is short for a document
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            rows: list[Row] = []
            for row in reader:
                if None in row:
                    refuse(flag, str(path), f"line {reader.line_num} has more values than the header; quote commas")
                rows.append(dict(row))
            return rows
    except csv.Error as error:
        refuse(flag, str(path), f"not CSV near line {reader.line_num} ({error}); check its quotes")
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, flag: str) -> list[Row]:
    """A Parquet file; a list column comes as an array, which `records` accepts."""
    import pandas

    try:
        return pandas.read_parquet(path).to_dict("records")
    except ValueError as error:  # what pyarrow raises for a file that is something else
        refuse(flag, str(path), f"not a Parquet file ({type(error).__name__}); write it anew")


def _read_folder(path: Path, flag: str, split: str) -> list[Row]:
    """One split of a saved DatasetDict, or the whole of a saved Dataset."""
    import datasets

    saved = _load_folder(path, flag)
    if not isinstance(saved, datasets.DatasetDict):
        return saved.to_list()
    name = next((name for name in SPLITS[split] if name in saved), None)
    if name is None:
        refuse(flag, str(path), f"has no split {' or '.join(SPLITS[split])} (it has {', '.join(saved)}); add it")
    return saved[name].to_list()


def _load_folder(path: Path, flag: str) -> datasets.DatasetDict | datasets.Dataset:
    """Map a saved folder."""
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, InvalidArgument):
            raise
        refuse(
            flag, str(path), f"not a readable DatasetDict.save_to_disk folder ({type(error).__name__}); save it anew"
        )


_READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
