"""Counts what a run would draw from, without a tokenizer: for a plan before there is one.

Rows are checked as far as that goes: their columns, and whose they are.
"""

from __future__ import annotations

from collections import Counter

from dptune.units.unit import PrivacyUnit
from utils.data.forms import Form, NamedColumns, form_of
from utils.data.lost_columns import refuse_lost_columns
from utils.data.row_authors import refuse_unnoticed_users
from utils.data.sources import AbstractRows, RowSource, numbered
from utils.files.cells import author_of, require_columns


def count_sampled(
    source: RowSource, unit: PrivacyUnit, *, prompt_style: str, named: NamedColumns, users_flag: str | None
) -> int:
    """The number of rows, of rows that are kept of all authors, or of authors: what a step of `unit` draws from.

    Args:
        source: the training set.
        unit: the privacy unit.
        prompt_style, named, users_flag: see `utils.data.records.RowRecords`.

    Raises:
        InvalidArgument: a reader refuses a file, or a row lacks a column, has one that would be left out, or names
            users. Names the flag, the file and the row.
    """
    rows, alone, first = 0, 0, ""
    form: Form | None = None
    of_author: Counter[str] = Counter()
    for place, row in numbered(source, unit.column):
        rows += 1
        if not isinstance(source, AbstractRows):
            if form is None:
                form, first = form_of(row, prompt_style, place, named), place.path
            if users_flag is not None:
                refuse_unnoticed_users([row], place.flag, place.path, users_flag)
            require_columns(row, form.columns, place, first)
            refuse_lost_columns(row, form.used, place)
        if unit.column is not None:
            author = author_of(row, unit.column, place)
            if author is None:
                alone += 1  # a row without an author is an author of its own
            else:
                of_author[author] += 1
    if unit.samples_authors:
        return alone + len(of_author)
    if unit.bounds_authors:
        return alone + sum(min(number, unit.examples) for number in of_author.values())
    return rows
