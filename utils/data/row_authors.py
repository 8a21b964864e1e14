"""Finds each row's author, and refuses to protect single rows of a file that names people unless told to.

An epsilon per row promises little to a person with many rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dptune._validate import refuse
from dptune.units.columns import names_users
from utils.files.cells import Place, author_of
from utils.files.tables import Row, show_columns


def refuse_unnoticed_users(
    rows: Iterable[Row], flag: str, path: str, remedy: str | None, *, column: str | None = None
) -> None:
    """Refuse rows if the name of any column says that it holds users. For programs whose unit is the row.

    Args:
        rows: all rows, not only the first.
        flag, path: the source of the rows, for the error.
        remedy: the flag that makes the users of a column the unit; None if the program has none.
        column: a column that holds users, whatever its name.
    """
    for row in rows:
        for name in row:
            if name == column or names_users(name):
                shown = " ".join(name.split())
                if remedy is None:
                    told = "this program protects rows, not all rows of a user; give --ignore_users if that is enough"
                    refuse(flag, path, f"names users in {shown}, but {told}")
                refuse(flag, path, f"names users in {shown}; give {remedy} {shown}, or --ignore_users to protect rows")


def authors_of(rows: Sequence[Row], column: str, flag: str, path: str) -> list[str | None]:
    """The author of each row (`dptune.units.names.author_name`), from the column of --privacy_unit.

    Raises:
        InvalidArgument: no row has the column, or a value names no author (names the row).
    """
    if not any(column in row for row in rows):
        remedy = f"no such column in {path}, which has {show_columns(rows[0])}; name one of them"
        refuse("--privacy_unit", column, remedy)
    return [author_of(row, column, Place(flag, path, number)) for number, row in enumerate(rows, start=1)]
