"""Extracts instructions from conversations, and removes copies without weakening privacy.

Removing one privacy unit from the file may change the training data by that unit only. Filters look at single rows, so
they satisfy this. Removing copies compares rows, and satisfies it only under these rules:

* Without users, a unit is a distinct row of the output. The output depends only on what is compared: the normalised
  text, never the variant that came first; with replies, text and reply together. So removing a row of the file removes
  at most one row of the output. If the first of several copies set the reply or the id, removing it would replace an
  output row by another: two changes, where epsilon counts one.
* With users, a unit is a user, and copies are removed among the rows of one user only. Across users, the first user
  would own the kept copy. Removing that user would then give another user a new row.

Without users, several conversations with the same text are one row, which all their writers share: the unit protects
the text, not the people who wrote it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from dptune._validate import refuse, require_count
from utils.data.languages import LanguageFilter
from utils.files.cells import Place, author_of, is_text
from utils.files.tables import Row

LANGUAGE_COLUMN = "language"
# {column of turns: (key of the role, key of the text)}: the first as in LMSYS-Chat-1M, the second as in ShareGPT.
TURN_COLUMNS = {"conversation": ("role", "content"), "conversations": ("from", "value")}
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt", "chatgpt", "model", "bing", "bard")
_BLANK_LINES = re.compile(r"\n{3,}")
_ID_DIGITS = 24  # 96 bits: practically unique among a billion rows


class Unusable(Exception):
    """Raised for a row that gives no question. Its message is the reason, without text from the row."""


@dataclass(frozen=True)
class FirstTurn:
    """The first thing a user said.

    Attributes:
        text: the normalised text.
        reply: the assistant's next turn, unchanged; None if it is missing or blank.
    """

    text: str
    reply: str | None


def normalised(text: str) -> str:
    """`text` in Unicode's composed form (NFC), without invisible white space.

    Inner runs of spaces and tabs become one space, lines are stripped at the end, the text is stripped, and three or
    more line breaks become two. Indentation stays, since code needs it.

    >>> normalised("Sort \\t this:\\r\\n\\r\\n\\r\\n    x  =  1 \\n")
    'Sort this:\\n\\n    x = 1'
    """
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return _BLANK_LINES.sub("\n\n", "\n".join(map(_one_spaced, lines))).strip()


def first_question(row: Row) -> FirstTurn:
    """What the user asked first.

    Raises:
        Unusable: there are no turns, a turn is damaged, no turn is a user's, or the first question is blank.
    """
    column = next((name for name in TURN_COLUMNS if row.get(name) is not None), None)
    turns = row[column] if column is not None else None
    if column is None or not isinstance(turns, list) or not turns:
        raise Unusable("no conversation")
    said = [_turn(turn, *TURN_COLUMNS[column]) for turn in turns]
    first = next((place for place, (who, _) in enumerate(said) if who in _USER), None)
    if first is None:
        raise Unusable("no turn of a user")
    text = normalised(said[first][1])
    if not text:
        raise Unusable("a blank question")
    who, reply = said[first + 1] if first + 1 < len(said) else ("", "")
    return FirstTurn(text, reply if who in _ASSISTANT and reply.strip() else None)


@dataclass(frozen=True)
class Selection:
    """Which first questions to keep.

    Attributes:
        min_chars, max_chars: length limits of the normalised question in characters, inclusive; None is no limit.
        language: see `utils.data.languages`; None keeps all languages.
        user_column: the column that names each row's user, if users are the unit.
        keep_answers: whether to keep the first reply; conversations without one are then left out.
    """

    min_chars: int = 1
    max_chars: int | None = None
    language: LanguageFilter | None = None
    user_column: str | None = None
    keep_answers: bool = False

    def __post_init__(self) -> None:
        require_count("--min_chars", self.min_chars)
        if self.max_chars is not None and self.max_chars < self.min_chars:
            refuse("--max_chars", self.max_chars, f"must be at least --min_chars ({self.min_chars})")

    def select(self, row: Row, place: Place) -> Row:
        """The output row of one conversation.

        Raises:
            Unusable: the conversation is left out; says why.
            InvalidArgument: its user is neither text nor a number, or its language is unknown. Names the row.
        """
        question = first_question(row)
        if len(question.text) < self.min_chars:
            raise Unusable("too short")
        if self.max_chars is not None and len(question.text) > self.max_chars:
            raise Unusable("too long")
        if self.language is not None and not self.language.accepts(row.get(LANGUAGE_COLUMN), question.text, place):
            raise Unusable("another language")
        selected: Row = {"instruction": question.text}
        if self.keep_answers:
            if question.reply is None:
                raise Unusable("no reply")
            selected["answer"] = question.reply
        user = None if self.user_column is None else author_of(row, self.user_column, place)
        return selected if user is None else selected | {"user": user}


def instructions(rows: Iterable[tuple[Place, Row]], selection: Selection, left_out: Counter[str]) -> Iterator[Row]:
    """The selected instructions without copies (see above), each with an `id` made from its content.

    Args:
        rows: conversations and their places.
        selection: which to keep.
        left_out: counts the others by reason; it is updated in place.
    """
    seen: set[bytes] = set()
    for place, row in rows:
        try:
            selected = selection.select(row, place)
        except Unusable as reason:
            left_out[str(reason)] += 1
            continue
        digest = _identity(selected)
        if digest in seen:
            left_out["a copy"] += 1
            continue
        seen.add(digest)
        yield {"id": f"conv-{digest.hex()[:_ID_DIGITS]}", **selected}


def _identity(selected: Row) -> bytes:
    """A digest that copies share: the same question of one user, or, without a user, the same row."""
    compared = {name: value for name, value in selected.items() if name != "answer" or "user" not in selected}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).digest()[:16]


def _one_spaced(line: str) -> str:
    """A line with its indentation, one space between words, and no space at the end."""
    indentation = line[: len(line) - len(line.lstrip())]
    words = line.split()
    return indentation + " ".join(words) if words else ""


def _turn(turn: object, who: str, what: str) -> tuple[str, str]:
    """(role, text) of one turn."""
    if not isinstance(turn, Mapping) or not is_text(turn.get(who)) or not is_text(turn.get(what)):
        raise Unusable("a damaged turn")
    return str(turn[who]).strip().lower(), str(turn[what])
