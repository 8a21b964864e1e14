"""Instructions out of conversations, and why the number of privacy units is counted after copies are gone.

Taking one privacy unit out of the file may change what training sees by that unit and nothing else. Filters look at one
row alone, so they keep that. Leaving copies out looks at several, and keeps it only like this:

* Without users a unit is a distinct row of the output. What is written is a function of what is compared: the text
  that was normalised, never the variant that came first; with replies, the text and the reply together. So a row of the
  file adds one row to the output or none, and taking it out takes that one row or nothing. If the first of several
  copies lent its reply or its id, taking it out would put another row in the place of the one that it takes away: two
  changes where epsilon counts one.
* With users a unit is a user, and copies are left out among one user's rows only. Across users, the copy that is kept
  would belong to whoever came first; taking that user out would give another user a row that they did not have.

Whoever says a common thing in several conversations of a file without users is one row in it, and others who said the
same share that row: the unit protects the text, not the people who wrote it.
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
# Column of the turns: (who says it, what is said). LMSYS-Chat-1M has the first, ShareGPT the second.
TURN_COLUMNS = {"conversation": ("role", "content"), "conversations": ("from", "value")}
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt", "chatgpt", "model", "bing", "bard")
_BLANK_LINES = re.compile(r"\n{3,}")
_ID_DIGITS = 24  # 96 bits: no two of a billion rows get the same


class Unusable(Exception):
    """A row that gives no question; its text is the reason, and quotes nothing."""


@dataclass(frozen=True)
class FirstTurn:
    """What a user said first.

    Attributes:
        text: normalised.
        reply: of the assistant, as it stands; None where none follows at once, or a blank one.
    """

    text: str
    reply: str | None


def normalised(text: str) -> str:
    """`text` in Unicode's composed form (NFC), without white space that nobody sees.

    Inner runs of spaces and tabs become one space, ends of lines and of the text are stripped, three line ends or more
    become two. Indentation stays, for code needs it.

    >>> normalised("Sort \\t this:\\r\\n\\r\\n\\r\\n    x  =  1 \\n")
    'Sort this:\\n\\n    x = 1'
    """
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return _BLANK_LINES.sub("\n\n", "\n".join(map(_one_spaced, lines))).strip()


def first_question(row: Row) -> FirstTurn:
    """What the user asked first.

    Raises:
        Unusable: there are no turns, a turn is damaged, no user speaks, or the first question is blank.
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
    """Which first questions are kept.

    Attributes:
        min_chars, max_chars: length of the normalised question in characters, both included; no upper limit for None.
        language: see `utils.data.languages`; all for None.
        user_column: names each row's user, if users are the unit.
        keep_answers: whether the first reply goes along; conversations without one are then left out.
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
            Unusable: it is left out; says why.
            InvalidArgument: its user is neither text nor a number, or its language cannot be told; names the row.
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
    """What is kept of a file of conversations, copies left out (see above), each with an `id` made from its content.

    Args:
        rows: conversations and where they stand.
        selection: which are kept.
        left_out: counts the others, by reason.
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
    """Rows with one digest are copies: of one user the same question, of nobody the same row."""
    compared = {name: value for name, value in selected.items() if name != "answer" or "user" not in selected}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).digest()[:16]


def _one_spaced(line: str) -> str:
    """A line with its indentation, one space between words, and nothing after the last."""
    indentation = line[: len(line) - len(line.lstrip())]
    words = line.split()
    return indentation + " ".join(words) if words else ""


def _turn(turn: object, who: str, what: str) -> tuple[str, str]:
    """(who, what) of one turn."""
    if not isinstance(turn, Mapping) or not is_text(turn.get(who)) or not is_text(turn.get(what)):
        raise Unusable("a damaged turn")
    return str(turn[who]).strip().lower(), str(turn[what])
