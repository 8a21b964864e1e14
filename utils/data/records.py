"""Turns rows into records: the whole text of an example, and which characters of it are the answer.

A record is the privacy unit, or belongs to one through its author. So every row becomes exactly one record: none is
dropped, merged or split here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dptune._validate import refuse
from utils.data.prompts import UNCONDITIONAL, format_prompt, has_chat_template, render_chat
from utils.data.row_authors import refuse_unnoticed_users
from utils.files.cells import Place, author_of, is_text, kind_of, require_columns, text_of
from utils.files.tables import Row, read_rows, show_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The first set that a file has is used; other columns are ignored.
COLUMN_SETS = (("instruction", "answer"), ("prompt", "completion"), ("messages",))
_INSTRUCTIONS_ALONE = ("instruction",)  # learned with the style "uncond_generation"
_ROLE, _CONTENT = "role", "content"


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        text: the whole text, prompt and answer.
        answers: (start, end) of each answer in characters of `text`, end excluded, ascending. Empty if there is nothing
            to learn (a conversation without an assistant turn); an empty answer is (n, n).
        author: the row's author, from the column of the privacy unit. None without such a column, or if the row has no
            value there; the row is then a unit by itself.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    author: str | None = field(default=None, repr=False)


def load_records(
    path: str | Path,
    *,
    flag: str,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    author_column: str | None = None,
    users_flag: str | None = None,
) -> list[Record]:
    """One record per row of a file or of a saved DatasetDict's split.

    Args:
        path: what `utils.files.tables.read_rows` reads.
        flag: the command-line flag that gave `path`; errors name it.
        prompt_style: how an instruction becomes a prompt. Prompt and completion are joined unchanged, and messages
            always use the chat template. "uncond_generation" learns the instructions, without a prompt, and ignores
            answers.
        tokenizer: its chat template renders messages and the "chat" style.
        split: "train" or "validation", for folders.
        author_column: the column that names each row's author, if authors are the privacy unit.
        users_flag: the flag that makes authors the unit. A file with a column of users is refused, naming it; None
            takes every file.

    Raises:
        InvalidArgument: `read_rows` refuses the file, a column is missing, or a value is not text. Names flag, file and
            row.
    """
    rows = read_rows(path, flag, split)
    if users_flag is not None:
        refuse_unnoticed_users(rows, flag, str(path), users_flag)
    columns = _column_set(rows[0], prompt_style, flag, str(path))
    if columns == ("messages",) and not has_chat_template(tokenizer):
        refuse(flag, str(path), "has messages, but the tokenizer has no chat template; give prompt/completion rows")
    if author_column is not None and not any(author_column in row for row in rows):
        found = show_columns(rows[0])
        refuse("--privacy_unit", author_column, f"no such column in {path}, which has {found}; name one of them")
    records = []
    for number, row in enumerate(rows, start=1):
        place = Place(flag, str(path), number)
        require_columns(row, columns, place)
        record = _record(row, columns, prompt_style, tokenizer, place)
        records.append(
            record if author_column is None else replace(record, author=author_of(row, author_column, place))
        )
    return records


def load_texts(
    path: str | Path, *, flag: str, column: str, split: str = "train", author_column: str | None = None
) -> list[Record]:
    """One record per row; its whole text is learned.

    Args:
        path, flag, split: see `load_records`.
        column: the column of the texts.
        author_column: the column that names each row's author, if authors are the privacy unit.

    Raises:
        InvalidArgument: `read_rows` refuses the file, a column is missing, or a value is not text. Names flag, file and
            row.
    """
    rows = read_rows(path, flag, split)
    found = show_columns(rows[0])
    if not any(column in row for row in rows):
        refuse("--text_column", column, f"no such column in {path}, which has {found}; name one of them")
    if author_column is not None and not any(author_column in row for row in rows):
        refuse("--author_column", author_column, f"no such column in {path}, which has {found}; name one of them")
    records = []
    for number, row in enumerate(rows, start=1):
        place = Place(flag, str(path), number)
        require_columns(row, (column,), place)
        text = text_of(row, column, place)
        author = None if author_column is None else author_of(row, author_column, place)
        records.append(Record(text, ((0, len(text)),), author))
    return records


def prompt_and_answer(prompt: str, answer: str) -> Record:
    """The record of one prompt and its answer.

    >>> prompt_and_answer("Abstract: ", "We show.")
    Record(text='Abstract: We show.', answers=((10, 18),))
    """
    text = prompt + answer
    return Record(text, ((len(prompt), len(text)),))


def end_of_turn(text: str, eos_token: str | None) -> int:
    """Where `text` ends without white space after a final end token; its length if it has no end token."""
    stripped = text.rstrip()
    return len(stripped) if eos_token and stripped.endswith(eos_token) else len(text)


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


def _record(row: Row, columns: tuple[str, ...], style: str, tokenizer: PreTrainedTokenizerBase, place: Place) -> Record:
    """One row as a record."""
    if columns == ("messages",):
        return _conversation(_messages(row["messages"], place), tokenizer, place)
    if columns == _INSTRUCTIONS_ALONE:
        return prompt_and_answer(format_prompt("", style), text_of(row, "instruction", place))
    prompt, answer = (text_of(row, name, place) for name in columns)
    return prompt_and_answer(format_prompt(prompt, style, tokenizer) if columns[0] == "instruction" else prompt, answer)


def _messages(value: object, place: Place) -> list[dict[str, str]]:
    """A list of {"role": str, "content": str}; other keys are dropped."""
    turns = list(value) if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        place.refuse(f"messages must be a list of at least one {{role, content}}, not {type(value).__name__}")
    for number, turn in enumerate(turns, start=1):
        for key in (_ROLE, _CONTENT):
            if not is_text(turn.get(key)):
                place.refuse(f"message {number} has no text as its {key} ({kind_of(turn.get(key))}); give a string")
    return [{_ROLE: turn[_ROLE], _CONTENT: turn[_CONTENT]} for turn in turns]


def _conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, place: Place) -> Record:
    """The rendered conversation up to its last answer, with every answer marked. What follows has no loss."""
    text = _render(messages, tokenizer, place, add_generation_prompt=False)
    answers = tuple(
        _assistant_span(text, messages, turn, tokenizer, place)
        for turn, message in enumerate(messages)
        if message[_ROLE] == "assistant"
    )
    return Record(text[: answers[-1][1]] if answers else text, answers)


def _assistant_span(
    text: str, messages: Sequence[dict[str, str]], turn: int, tokenizer: PreTrainedTokenizerBase, place: Place
) -> tuple[int, int]:
    """The characters of `text` that the model would write at `turn`: from the generation prompt to the turn's end.

    Found by rendering the conversation before and including the turn. This is right only if both are prefixes of the
    whole text. Templates that rewrite earlier turns, for example to drop reasoning, are refused.
    """
    before = _render(messages[:turn], tokenizer, place, add_generation_prompt=True)
    through = _render(messages[: turn + 1], tokenizer, place, add_generation_prompt=False)
    if not (text.startswith(through) and through.startswith(before)):
        place.refuse(
            f"the chat template renders the turns up to message {turn + 1} differently when more follow, so the "
            "answer cannot be found; give prompt/completion rows instead"
        )
    return len(before), len(before) + end_of_turn(through[len(before) :], tokenizer.eos_token)


def _render(
    messages: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    place: Place,
    *,
    add_generation_prompt: bool,
) -> str:
    """`render_chat`. Does not show the template's error message, which may quote the row."""
    try:
        return render_chat(messages, tokenizer, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        place.refuse(f"the chat template refuses this order of roles ({type(error).__name__}); fix the row")
