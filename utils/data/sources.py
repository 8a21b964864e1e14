"""Where the rows of a data set come from: files, the hub, or the abstracts of PubMed. All are read as streams."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from dptune._validate import refuse
from utils.data.pubmed import DayRange, abstract_files, stream_abstracts
from utils.files.cells import Place
from utils.files.tables import Row, show_columns, stream_rows

Part = tuple[str, Callable[[], Iterator[Row]]]  # (its name for errors, what reads its rows from the start)


class RowSource(Protocol):
    """The rows of a training set or of a validation set."""

    @property
    def flag(self) -> str:
        """The command-line flag that names it, for errors."""

    @property
    def may_be_empty(self) -> bool:
        """Whether no rows at all are no error."""

    def parts(self) -> Iterator[Part]:
        """The files, in order."""

    def state(self) -> object:
        """A JSON value that is another one when the rows may be others."""


@dataclass(frozen=True)
class FileRows:
    """The rows of files, or of a split of saved DatasetDicts.

    Attributes:
        paths: see `utils.files.shards.find_files`.
        flag: the flag that named them.
        split: "train" or "validation", for folders.
    """

    paths: list[Path]
    flag: str
    split: str = "train"
    may_be_empty: bool = False

    def parts(self) -> Iterator[Part]:
        """One for each path."""
        for path in self.paths:
            yield str(path), partial(stream_rows, path, self.flag, self.split)

    def state(self) -> object:
        """Size and time of change of each file."""
        return [self.split, *file_states(self.paths)]


@dataclass(frozen=True)
class AbstractRows:
    """The abstracts of PubMed in a folder, as rows with an `abstract`. They pass through a file that has no name, in
    the system's folder for temporary files.

    Attributes:
        folder, days: see `utils.data.pubmed`.
        held_out: whether they are those of the validation files.
        flag: the flag that named the data set.
    """

    folder: Path
    days: DayRange
    held_out: bool = False
    flag: str = "--dataset_name"

    @property
    def may_be_empty(self) -> bool:
        """Validation files may have no abstract of these days."""
        return self.held_out

    def parts(self) -> Iterator[Part]:
        """The folder as one part: a paper may be revised by another file."""
        yield str(self.folder), self._rows

    def _rows(self) -> Iterator[Row]:
        with tempfile.TemporaryFile() as texts:
            for abstract in stream_abstracts(self.folder, self.days, texts, held_out=self.held_out):
                yield {"abstract": abstract}

    def state(self) -> object:
        """The days, and size and time of change of each file."""
        return [str(self.days), *file_states(abstract_files(self.folder, held_out=self.held_out))]


def numbered(source: RowSource, author_column: str | None = None) -> Iterator[tuple[Place, Row]]:
    """Every row of a source with its place.

    Args:
        source: where the rows come from.
        author_column: a column that each part must have in at least one row.

    Raises:
        InvalidArgument: a part has no rows and must have some, or lacks the column; or what the reader refuses.
    """
    for name, read in source.parts():
        number = 0
        for number, row in enumerate(read(), start=1):
            if number == 1 and author_column is not None:
                _require_authors(row, author_column, name, read)
            yield Place(source.flag, name, number), row
        if not number and not source.may_be_empty:
            refuse(source.flag, name, "is empty; give a file with at least one row")


def _require_authors(first: Row, column: str, name: str, read: Callable[[], Iterator[Row]]) -> None:
    """Refuse a part in which no row has the column. Without it every row would be an author of its own."""
    if column not in first and not any(column in row for row in read()):
        found = show_columns(first)
        refuse("--privacy_unit", column, f"no such column in {name}, which has {found}; name one of them")


def file_states(paths: list[Path]) -> list[list[object]]:
    """[path, size, time of change] of each file, and of the files below each folder."""
    files = [one for path in paths for one in (sorted(path.rglob("*")) if path.is_dir() else [path]) if one.is_file()]
    return [[str(one.resolve()), one.stat().st_size, one.stat().st_mtime_ns] for one in files]
