"""Turns rows into records: the whole text of an example, and which characters of it are the answer.

A record is the privacy unit, or belongs to one through its author. So every row becomes exactly one record: none is
dropped, merged or split here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import refuse
from utils.data.answers import ASSISTANT, CONTENT, ROLE, AnswerNotFound, find_answers
from utils.data.lost_columns import refuse_lost_columns
from utils.data.prompts import AS_IS, UNCONDITIONAL, ChatTemplateError, format_prompt, has_chat_template, render_chat
from utils.data.row_authors import refuse_unnoticed_users
from utils.data.special_tokens import Spans, SpecialTokens, StandInLost
from utils.files.cells import Place, author_of, is_text, kind_of, require_columns, text_of
from utils.files.tables import Row, read_rows, show_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The first set that a file has is used; other columns are ignored.
COLUMN_SETS = (("instruction", "answer"), ("prompt", "completion"), ("messages",))
_INSTRUCTIONS_ALONE = ("instruction",)  # learned with the style "uncond_generation"
_ROLES_SHOWN = 10


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        text: the whole text, prompt and answer.
        answers: (start, end) of each answer in characters of `text`, end excluded, ascending. Empty if there is nothing
            to learn (a conversation without an assistant turn); an empty answer is (n, n).
        author: the row's author, from the column of the privacy unit. None without such a column, or if the row has no
            value there; the row is then a unit by itself.
        typed: (start, end) of what a person typed that spells a special token, ascending. It is text.
    """

    text: str
    answers: Spans
    author: str | None = field(default=None, repr=False)
    typed: Spans = field(default=(), repr=False)


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

    Raises:
        InvalidArgument: the first row has no set of columns, or messages and the tokenizer has no chat template.
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
    ) -> None:
        self._columns = _column_set(first, prompt_style, place.flag, place.path)
        if self._columns == ("messages",) and not has_chat_template(tokenizer):
            told = "has messages, but the tokenizer has no chat template; give prompt/completion rows"
            refuse(place.flag, place.path, told)
        self._maker, self._first = RecordMaker(tokenizer, prompt_style), place.path
        self._author_column, self._users_flag = author_column, users_flag

    def __call__(self, row: Row, place: Place) -> Record:
        """The record of one row.

        Raises:
            InvalidArgument: a column is missing, or a value is not text. Names flag, file and row.
        """
        if self._users_flag is not None:
            refuse_unnoticed_users([row], place.flag, place.path, self._users_flag)
        require_columns(row, self._columns, place, self._first)
        refuse_lost_columns(row, self._columns, place)
        record = _record(row, self._columns, self._maker, place)
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
        turns = row.get("messages")
        roles |= {str(turn.get(ROLE)) for turn in (turns if isinstance(turns, list) else ()) if isinstance(turn, dict)}
        roles = set(sorted(roles)[:_ROLES_SHOWN])
    return f" (answers have the role {ASSISTANT}; the file has {show_columns(sorted(roles))})" if roles else ""


def prompt_and_answer(prompt: str, answer: str) -> Record:
    """The record of one prompt and its answer.

    >>> prompt_and_answer("Abstract: ", "We show.")
    Record(text='Abstract: We show.', answers=((10, 18),))
    """
    text = prompt + answer
    return Record(text, ((len(prompt), len(text)),))


class RecordMaker:
    """Makes records of prompts and answers, in which special tokens that people typed are text.

    Args:
        tokenizer: its chat template renders messages and the "chat" style.
        style: see `utils.data.prompts.format_prompt`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: str = "plain") -> None:
        self.style, self._tokenizer, self._tokens = style, tokenizer, SpecialTokens(tokenizer)

    def instructed(self, instruction: str, answer: str) -> Record:
        """An instruction and its answer. Raises `ChatTemplateError` or `StandInLost`."""
        asked = instruction if self.style == AS_IS else self._tokens.hidden(instruction)
        return self.answered(format_prompt(asked, self.style, self._tokenizer), answer)

    def answered(self, prompt: str, answer: str) -> Record:
        """A prompt whose special tokens count, and an answer of a person."""
        return self._record(prompt + self._tokens.hidden_answer(answer), [len(prompt), None])

    def completed(self, prompt: str, completion: str) -> Record:
        """A rendered prompt and its completion, in which only start and end tokens are text, unless they end it."""
        return self._record(prompt + self._tokens.hidden_answer(completion, self._tokens.ends), [len(prompt), None])

    def conversation(self, messages: Sequence[dict[str, str]]) -> Record:
        """The rendered conversation up to its last answer, with every answer marked. What follows has no loss.

        Raises:
            ChatTemplateError, AnswerNotFound, StandInLost: see there.
        """
        turns = [{**turn, CONTENT: self._tokens.hidden(turn[CONTENT])} for turn in messages]
        render = partial(render_chat, tokenizer=self._tokenizer)
        hidden, answers = find_answers(turns, render, self._tokens)
        return self._record(hidden, [position for answer in answers for position in answer])

    def _record(self, hidden: str, positions: Sequence[int | None]) -> Record:
        """The record of a text with stand-ins; None is the text's end."""
        ends = [len(hidden) if position is None else position for position in positions]
        (text, typed), moved = self._tokens.shown(hidden, ends)
        return Record(text, tuple(zip(moved[::2], moved[1::2], strict=True)), typed=typed)


def _column_set(row: Row, style: str, flag: str, path: str) -> tuple[str, ...]:
    """The first of COLUMN_SETS that the first row has; instructions alone for the style that learns them."""
    if style == UNCONDITIONAL:
        if "instruction" not in row:
            refuse(flag, path, f"found the columns {show_columns(row)}; --prompt_style {style} learns `instruction`")
        return _INSTRUCTIONS_ALONE
    found = next((columns for columns in COLUMN_SETS if all(name in row for name in columns)), None)
    if found is None:
        accepted = ", or ".join("/".join(columns) for columns in COLUMN_SETS)
        refuse(flag, path, f"found the columns {show_columns(row)}; name them {accepted}")
    return found


def _record(row: Row, columns: tuple[str, ...], maker: RecordMaker, place: Place) -> Record:
    """One row as a record. No message shows what the template says, which may quote the row."""
    try:
        if columns == ("messages",):
            return maker.conversation(_messages(row["messages"], place))
        if columns == _INSTRUCTIONS_ALONE:
            return maker.instructed("", text_of(row, "instruction", place))
        make = maker.instructed if columns[0] == "instruction" else maker.completed
        return make(*(text_of(row, name, place) for name in columns))
    except ChatTemplateError as error:
        place.refuse(f"{error}; fix the row")
    except (AnswerNotFound, StandInLost) as error:
        place.refuse(f"{error}; give prompt/completion rows instead")


def _messages(value: object, place: Place) -> list[dict[str, str]]:
    """A list of {"role": str, "content": str}; other keys are dropped."""
    turns = list(value) if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        place.refuse(f"messages must be a list of at least one {{role, content}}, not {type(value).__name__}")
    for number, turn in enumerate(turns, start=1):
        for key in (ROLE, CONTENT):
            if not is_text(turn.get(key)):
                place.refuse(f"message {number} has no text as its {key} ({kind_of(turn.get(key))}); give a string")
    return [{ROLE: turn[ROLE], CONTENT: turn[CONTENT]} for turn in turns]
