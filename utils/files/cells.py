"""Reads cells of a row: text, or the row's author. A refused value is reported by its row and never shown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from dptune._validate import refuse
from dptune.units.names import author_name
from utils.files.tables import Row

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Place:
    """Where a row is, for errors.

    Attributes:
        flag: the command-line flag that gave `path`.
        path: the file or folder.
        row: number of the row, from 1.
    """

    flag: str
    path: str
    row: int

    def refuse(self, remedy: str) -> NoReturn:
        """Refuse the file, naming the row."""
        refuse(self.flag, self.path, f"row {self.row} (counted from 1): {remedy}")


def is_text(value: object) -> bool:
    """Whether a value is a string that every tokenizer takes: JSON can also hold half of a surrogate pair."""
    return isinstance(value, str) and _SURROGATE.search(value) is None


def require_columns(row: Row, columns: Sequence[str], place: Place, first: str | None = None) -> None:
    """Refuse a row without these columns: later rows of a JSON file may lack columns of the first.

    Args:
        row: the row.
        columns: columns of the first row.
        place: where the row is.
        first: the file that the first row is in, of several.
    """
    for name in columns:
        if name not in row:
            where = "row 1" if first in (None, place.path) else f"row 1 of {first}"
            place.refuse(f"{name} is missing, although {where} has it; give every row the same columns")


def author_of(row: Row, column: str, place: Place) -> str | None:
    """The author that the row names (`dptune.units.names.author_name`). Errors do not show the value."""
    try:
        name = author_name(row.get(column))
    except TypeError as error:
        place.refuse(f"{column} is neither text nor a number ({error}); it must name the row's author")
    except ValueError as error:
        place.refuse(f"{column} is {error}, whose last digits may be lost; write it as text or as a whole number")
    if name is not None and not is_text(name):
        place.refuse(f"{column} holds half of a surrogate pair; it must name the row's author in valid Unicode")
    return name


def text_of(row: Row, name: str, place: Place) -> str:
    """The string in one column. Errors name the row and do not show the value."""
    value = row[name]
    if not is_text(value):
        place.refuse(f"{name} is not text ({kind_of(value)}); give a string, or leave the row out")
    return str(value)


def kind_of(value: object) -> str:
    """The kind of a value, for messages that must not show it."""
    if value is None:
        return "no value"
    return "half a surrogate pair in it" if isinstance(value, str) else type(value).__name__
