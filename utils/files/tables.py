"""Files of rows: JSON, JSONL, CSV, TSV, Parquet and saved `datasets` folders, each read as one dictionary per row.

The same table gives the same rows in every format, except that CSV and TSV hold text only. An empty cell and a NaN are
None. All but Parquet may be compressed.
A column name that occurs twice is refused, since one of the two values would be lost.

Rows are read one by one, so a large file stays on disk; only a JSON dictionary of columns is read whole. Every format
is read in place, because `datasets.load_dataset` would cache a copy of possibly private text in the home directory.

Errors name the flag, the file and the row or line. They never show the content of a row, since messages end up in logs.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dptune._validate import InvalidArgument, refuse
from utils.files.compressed import COMPRESSIONS, kind_of_file, open_text
from utils.files.json_lists import JSONList
from utils.files.jsonl import without_nan

if TYPE_CHECKING:  # programs import this module before they parse flags, so these libraries load later
    import datasets
    import pyarrow

Row = dict[str, object]
SPLITS = {"train": ("train",), "validation": ("validation", "val")}
_LONGEST_COLUMN_NAME = 40
_BATCH_ROWS = 1000


def read_rows(path: str | Path, flag: str, split: str = "train") -> list[Row]:
    """All rows of `stream_rows`; also refuses a file without rows."""
    rows = list(stream_rows(path, flag, split))
    if not rows:
        refuse(flag, str(path), "is empty; give a file with at least one row")
    return rows


def stream_rows(path: str | Path, flag: str, split: str = "train") -> Iterator[Row]:
    """The rows of a file, or of one split of a folder that `DatasetDict.save_to_disk` wrote, in order.

    Args:
        path: a file of one of KINDS, or a folder. A .json file holds a list of rows, or a dictionary of columns of
            equal length, which is read whole.
        flag: the command-line flag that gave `path`; errors name it.
        split: "train" or "validation", for folders; a file is always read whole.

    Raises:
        InvalidArgument: the file is missing, unreadable or of an unknown kind, names a column twice, or the folder has
            no such split. Raised only when reading reaches the problem.
    """
    import pyarrow

    path = Path(path)
    if not path.exists():
        refuse(flag, str(path), "no such file or folder; check the path")
    reader = partial(_stream_folder, split=split) if path.is_dir() else _READERS.get(kind_of_file(path))
    if reader is None:
        refuse(flag, str(path), f"unknown kind of file; give {KINDS_IN_WORDS}, or a saved DatasetDict")
    if path.is_file() and path.stat().st_size == 0:
        refuse(flag, str(path), "is empty; give a file with at least one row")
    try:
        yield from reader(path, flag)
    except UnicodeDecodeError:
        refuse(flag, str(path), "not UTF-8 text; save it as UTF-8")
    except pyarrow.ArrowException as error:
        refuse(flag, str(path), f"not a Parquet file, or damaged ({type(error).__name__}); create it again")
    except OSError as error:  # also what pyarrow raises for damaged pages
        refuse(
            flag, str(path), f"cannot be read ({error.strerror or type(error).__name__}); check it or create it again"
        )


def has_validation_split(path: str | Path, flag: str) -> bool:
    """Whether `path` is a saved DatasetDict with a validation split."""
    path = Path(path)
    if not path.is_dir():
        return False

    saved = _load_folder(path, flag)
    return isinstance(saved, dict) and any(name in saved for name in SPLITS["validation"])


def show_columns(names: Iterable[object]) -> str:
    """Column names for an error message. Hides what does not look like a name: a CSV without header has data there."""
    shown = [
        n if isinstance(n, str) and n.isidentifier() and len(n) <= _LONGEST_COLUMN_NAME else "(name not shown)"
        for n in names
    ]
    return ", ".join(shown) or "none"


def parse_json(text: str, flag: str, path: str | Path, line: int | None = None) -> object:
    """`json.loads` for users' files; a NaN becomes None.

    Raises:
        JSONDecodeError: `text` is not JSON, or Python cannot represent it.
        InvalidArgument: an object has a key twice. The message names `flag`, `path`, the line if given, and the key.
    """

    with _json_errors():
        return json.loads(text, object_pairs_hook=_unique(flag, path, line), parse_constant=_constant)


def _unique(flag: str, path: str | Path, line: int | None) -> Callable[[list[tuple[str, object]]], Row]:
    """Makes a dictionary of an object's pairs, and refuses a key that it has twice."""

    def unique(pairs: list[tuple[str, object]]) -> Row:
        require_unique([key for key, _ in pairs], flag, path, "" if line is None else f"line {line}: ")
        return dict(pairs)

    return unique


def _constant(name: str) -> object:
    return without_nan(float(name))


@contextmanager
def _json_errors() -> Iterator[None]:
    """Whatever Python cannot represent is a JSONDecodeError too."""
    try:
        yield
    except (json.JSONDecodeError, InvalidArgument):
        raise
    except (ValueError, RecursionError):
        raise json.JSONDecodeError("a number of thousands of digits, or nested too deeply", "", 0) from None


def require_unique(names: Sequence[str], flag: str, path: str | Path, where: str = "") -> None:
    """Refuse columns, or keys of one object, if a name occurs twice."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        refuse(flag, str(path), f"{where}{show_columns([twice])} is named twice; rename one of the two or remove it")


def _stream_jsonl(path: Path, flag: str) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_object(line, path, flag, number)


def _json_object(line: str, path: Path, flag: str, number: int) -> Row:
    try:
        row = parse_json(line, flag, path, number)
    except json.JSONDecodeError as error:
        refuse(flag, str(path), f"line {number} is not JSON ({error.msg}); put one whole JSON object on each line")
    if not isinstance(row, dict):
        refuse(flag, str(path), f"line {number} is not a JSON object; put one {{...}} on each line, or call it .json")
    return row


def _stream_json(path: Path, flag: str) -> Iterator[Row]:
    """The rows of a list one by one, or those of a dictionary of columns, which is read whole."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique(flag, path, None), parse_constant=_constant)
    rows: Iterable[object]

    def decode(text: str, at: int) -> tuple[object, int]:
        with _json_errors():
            return decoder.raw_decode(text, at)

    try:
        with open_text(path) as file:
            values = JSONList(file, decode)
            if values.begins_list():
                rows = values.values()
            else:
                with open_text(path) as again:
                    rows = _rows_of_columns(parse_json(again.read(), flag, path), path, flag)
            for row in rows:
                if not isinstance(row, dict):
                    _refuse_json(path, flag)
                yield row
    except json.JSONDecodeError as error:
        where = f"not JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        refuse(flag, str(path), f"{where}; fix it, or name the file .jsonl if it has one object per line")


def _rows_of_columns(content: object, path: Path, flag: str) -> list[Row]:
    """The rows of a dictionary of columns."""
    if not isinstance(content, dict):
        _refuse_json(path, flag)
    return _columns_to_rows(content, path, flag)


def _refuse_json(path: Path, flag: str) -> NoReturn:
    refuse(flag, str(path), "must hold a dictionary of lists (columns), or a list of dictionaries (rows)")


def _columns_to_rows(columns: dict[str, object], path: Path, flag: str) -> list[Row]:
    """{"instruction": [...], "answer": [...]} -> [{"instruction": ..., "answer": ...}, ...]."""
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    if len(lists) < len(columns):
        bad = show_columns(name for name in columns if name not in lists)
        refuse(flag, str(path), f"every value of the dictionary must be a list; change {bad}")
    sizes = {name: len(values) for name, values in lists.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{show_columns([name])} has {size}" for name, size in sizes.items())
        refuse(flag, str(path), f"lists of unequal length ({told}); give each row a value in every list")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _stream_csv(path: Path, flag: str, separator: str = ",") -> Iterator[Row]:
    """Values between separators with a header line; every value is a string ("NA" too).

    A surplus value is refused by line. A missing value is None.
    """
    kind, between = ("CSV", "commas") if separator == "," else ("TSV", "tabs")
    with open_text(path) as lines:
        reader = csv.DictReader(lines, strict=True, delimiter=separator)
        try:
            header = list(reader.fieldnames or ())
            require_unique(header, flag, path)
            unnamed = next((number for number, name in enumerate(header, start=1) if not name.strip()), None)
            if unnamed is not None:
                remedy = "name it or remove it (pandas: index=False)"
                refuse(flag, str(path), f"column {unnamed} of the header has no name; {remedy}")
            while (row := _next_of_csv(reader)) is not None:
                if None in row and len(header) == 1 and ";" in header[0]:
                    refuse(flag, str(path), "its header has ; between the columns; save it with commas")
                if None in row:
                    refuse(
                        flag,
                        str(path),
                        f"line {reader.line_num} has more values than the header; quote values with {between}",
                    )
                yield row
        except csv.Error as error:
            refuse(flag, str(path), f"not {kind} near line {reader.line_num} ({error}); check its quotes")


def _next_of_csv(reader: csv.DictReader[str]) -> Row | None:
    """The next row, with values of any length: the default limit of 131,072 characters is too short for documents."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        row = next(reader, None)
        return None if row is None else dict(row)
    finally:
        csv.field_size_limit(limit)


def _stream_parquet(path: Path, flag: str) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _require_unique_fields(list(file.schema_arrow), flag, path)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            yield from map(without_nan, batch.to_pylist())


def _require_unique_fields(fields: list[pyarrow.Field], flag: str, path: Path) -> None:
    """`require_unique` for the columns of a Parquet file and for nested fields."""
    require_unique([field.name for field in fields], flag, path)
    for field in fields:
        inner = [field.type.field(number) for number in range(field.type.num_fields)]
        _require_unique_fields(inner, flag, path)


def _stream_folder(path: Path, flag: str, split: str) -> Iterator[Row]:
    """One split of a saved DatasetDict, or the whole of a saved Dataset."""

    saved = _load_folder(path, flag)
    if isinstance(saved, dict):
        name = next((name for name in SPLITS[split] if name in saved), None)
        if name is None:
            refuse(flag, str(path), f"has no split {' or '.join(SPLITS[split])} (it has {', '.join(saved)}); add it")
        saved = saved[name]
    for batch in saved.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from map(without_nan, batch.to_pylist())


def _load_folder(path: Path, flag: str) -> datasets.DatasetDict | datasets.Dataset:
    """Memory-map a saved folder, without copying."""
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError) as error:  # the library's IndexError means a split without rows
        remedy = f"not a readable DatasetDict.save_to_disk folder with rows in every split ({type(error).__name__})"
        refuse(flag, str(path), f"{remedy}; save it again")


_TEXTS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": _stream_json,
    ".jsonl": _stream_jsonl,
    ".csv": _stream_csv,
    ".tsv": partial(_stream_csv, separator="\t"),
}
_READERS = {
    **_TEXTS,
    **{kind + suffix: reader for kind, reader in _TEXTS.items() for suffix in COMPRESSIONS},
    ".parquet": _stream_parquet,
}
KINDS = tuple(_READERS)  # suffixes of files
KINDS_IN_WORDS = f"{', '.join(_TEXTS)} (or with {' or '.join(COMPRESSIONS)}), or .parquet"
