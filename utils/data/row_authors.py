"""Whose each row of a file is, and the refusal to protect rows without a word where a file names people.

An epsilon for a row says little to somebody who has many of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from dptune._validate import refuse
from utils.files.cells import Place, author_of
from utils.files.tables import Row, show_columns

# That published sets have, in lower case and without what is neither letter nor digit: user_id and UserID are one.
_NAMES = frozenset(
    ["user", "userid", "username", "author", "authorid", "authorname", "account", "accountid", "accountname", "uid",
     "hashedip", "ip", "ipaddress", "person", "personid", "nickname", "screenname", "customer", "customerid", "client",
     "clientid", "patient", "patientid", "student", "studentid"]
)  # fmt: skip


def refuse_unnoticed_users(rows: Iterable[Row], flag: str, path: str, remedy: str) -> None:
    """Refuse rows any of which has a column that by its name tells whose it is; for where rows are the unit.

    Args:
        rows: all that are read, not the first alone.
        flag, path: what gave them, for the error.
        remedy: the flag that makes a column's people the unit.
    """
    for row in rows:
        for name in row:
            if _names_people(name):
                shown = " ".join(name.split())  # it differs from one of _NAMES by signs and white space only
                refuse(flag, path, f"names users in {shown}; give {remedy} {shown}, or --ignore_users to protect rows")


def authors_of(rows: Sequence[Row], column: str, flag: str, path: str) -> list[str | None]:
    """The author of each row (`dptune.units.unit.author_name`), by the column of --privacy_unit.

    Raises:
        InvalidArgument: no row has the column, or a value is neither text nor a number; names the row.
    """
    if not any(column in row for row in rows):
        remedy = f"no such column in {path}, which has {show_columns(rows[0])}; name one of them"
        refuse("--privacy_unit", column, remedy)
    return [author_of(row, column, Place(flag, path, number)) for number, row in enumerate(rows, start=1)]


@cache
def _names_people(column: str) -> bool:
    return re.sub("[^a-z0-9]", "", column.lower()) in _NAMES
