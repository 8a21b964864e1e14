"""Turns rows into records (`utils.data.record`).

A record is the privacy unit, or belongs to one through its author. So every row becomes exactly one record: none is
dropped, merged or split here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import refuse
from utils.data.answers import ASSISTANT, ROLE, AnswerNotFound
from utils.data.forms import AS_USUAL, Form, NamedColumns, form_of
from utils.data.lost_columns import refuse_lost_columns
from utils.data.prompts import ChatTemplateError, has_chat_template
from utils.data.record import Record, RecordMaker, prompt_and_answer
from utils.data.row_authors import refuse_unnoticed_users
from utils.data.special_tokens import StandInLost
from utils.data.tool_calls import ToolsLeftOut
from utils.files.cells import Place, author_of, require_columns, text_of
from utils.files.tables import Row, read_rows, show_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES_SHOWN = 10


class RowRecords:
    """Makes the record of each row of one or several files. It can be sent to another process.

    Args:
        first: the first row, which decides the columns.
        place: where it is.
        prompt_style: how an instruction becomes a prompt. Prompt and completion are joined unchanged, and messages
            always use the chat template. "uncond_generation" learns the instructions, without a prompt, and ignores
            answers.
        tokenizer: its chat template renders messages and the "chat" style.
        author_column: the column that names each row's author, if authors are the privacy unit.
        users_flag: the flag that makes authors the unit. A row with a column of users is refused, naming it; None
            takes every row.
        named: the columns that the user named.

    Attributes:
        prompt_style: the style that sampling must use.

    Raises:
        InvalidArgument: the first row has no known form, or messages and the tokenizer has no chat template.
    """

    def __init__(
        self,
        first: Row,
        place: Place,
        *,
        prompt_style: str,
        tokenizer: PreTrainedTokenizerBase,
        author_column: str | None = None,
        users_flag: str | None = None,
        named: NamedColumns = AS_USUAL,
    ) -> None:
        self._form = form_of(first, prompt_style, place, named)
        if self._form.chat and not has_chat_template(tokenizer):
            told = "has conversations, but the tokenizer has no chat template; give prompt/completion rows"
            refuse(place.flag, place.path, told)
        self._maker, self._first = RecordMaker(tokenizer, prompt_style), place.path
        self.prompt_style = self._form.style or prompt_style
        self._author_column, self._users_flag = author_column, users_flag

    def __call__(self, row: Row, place: Place) -> Record:
        """The record of one row.

        Raises:
            InvalidArgument: a column is missing, or a value is not text. Names flag, file and row.
        """
        if self._users_flag is not None:
            refuse_unnoticed_users([row], place.flag, place.path, self._users_flag)
        require_columns(row, self._form.columns, place, self._first)
        refuse_lost_columns(row, self._form.used, place)
        record = _record(row, self._form, self._maker, place)
        if self._author_column is None:
            return record
        return replace(record, author=author_of(row, self._author_column, place))


def load_texts(
    path: str | Path,
    *,
    flag: str,
    column: str,
    split: str = "train",
    author_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    users_flag: str | None = None,
) -> list[Record]:
    """One record per row; its whole text is learned.

    Args:
        path, flag, split: see `utils.files.tables.stream_rows`.
        column: the column of the texts.
        author_column: the column that names each row's author, if there is one.
        tokenizer: its special tokens in a text are text, except end tokens at the end. None knows no special tokens.
        users_flag: see `RowRecords`. A file with an `author_column` is refused too.

    Raises:
        InvalidArgument: `read_rows` refuses the file, a column is missing, or a value is not text. Names flag, file and
            row.
    """
    rows = read_rows(path, flag, split)
    maker = None if tokenizer is None else RecordMaker(tokenizer)
    found = show_columns(rows[0])
    if not any(column in row for row in rows):
        refuse("--text_column", column, f"no such column in {path}, which has {found}; name one of them")
    if author_column is not None and not any(author_column in row for row in rows):
        refuse("--author_column", author_column, f"no such column in {path}, which has {found}; name one of them")
    if users_flag is not None:
        refuse_unnoticed_users(rows, flag, str(path), users_flag, column=author_column)
    records = []
    for number, row in enumerate(rows, start=1):
        place = Place(flag, str(path), number)
        require_columns(row, (column,), place)
        text = text_of(row, column, place)
        author = None if author_column is None else author_of(row, author_column, place)
        record = prompt_and_answer("", text) if maker is None else maker.answered("", text)
        records.append(replace(record, author=author))
    return records


def roles_of(rows: Iterable[Row]) -> str:
    """Which roles the messages of rows have, for the message that none of them is an answer's; "" without messages.

    A role that does not look like a name is not shown.
    """
    roles: set[str] = set()
    for row in rows:
        turns = [turn for value in row.values() if isinstance(value, list) for turn in value if isinstance(turn, dict)]
        roles |= {str(turn.get(ROLE, turn.get("from"))) for turn in turns if ROLE in turn or "from" in turn}
        roles = set(sorted(roles)[:_ROLES_SHOWN])
    return f" (answers have the role {ASSISTANT}; the file has {show_columns(sorted(roles))})" if roles else ""


def _record(row: Row, form: Form, maker: RecordMaker, place: Place) -> Record:
    """One row as a record. No message shows what the template says, which may quote the row."""
    try:
        return form.make(row, maker, place)
    except ChatTemplateError as error:
        place.refuse(f"{error}; fix the row")
    except (AnswerNotFound, StandInLost, ToolsLeftOut) as error:
        place.refuse(f"{error}; give prompt/completion rows instead")
