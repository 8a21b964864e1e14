"""Columns beside an instruction that would be left out of the prompt, such as Alpaca's `input`.

What is asked is then only half there, and the model learns answers to something that it never sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from utils.files.cells import Place

# In lower case, letters only: `system_prompt` and `System Prompt` are one.
_NAMES = frozenset(
    ["context", "contexts", "history", "input", "inputs", "system", "systemmessage", "systemprompt", "tools"]
)


def lost_column(row: Mapping[str, object], used: Iterable[str]) -> str | None:
    """The first column of a row that belongs to its prompt, has a value and is not used; None if there is none."""
    unused = (name for name in row if name not in set(used) and _belongs_to_prompt(name))
    return next((name for name in unused if not _is_blank(row[name])), None)


def refuse_lost_columns(row: Mapping[str, object], used: Sequence[str], place: Place) -> None:
    """Refuse a row that has such a column; `used[0]` is the column that its value could be joined to."""
    if (name := lost_column(row, used)) is not None:
        shown = " ".join(name.split())  # safe to show: a name of _NAMES, up to signs and white space
        place.refuse(f"{shown} would be left out; join it to {used[0]} (as a turn, of messages), or drop the column")


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


@cache
def _belongs_to_prompt(column: str) -> bool:
    return re.sub("[^a-z]", "", column.lower()) in _NAMES
