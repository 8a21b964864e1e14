"""The first question of a conversation and the reply to it, from the two formats in which chats are published.

LMSYS-Chat-1M has `conversation: [{role, content}]`, ShareGPT `conversations: [{from, value}]`. Whatever is decided
about a row here is decided from that row alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from utils.files.cells import is_text
from utils.files.tables import Row

# column of the turns: (who says it, what is said)
FORMATS = {"conversation": ("role", "content"), "conversations": ("from", "value")}
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt", "chatgpt", "model", "bing", "bard")
_BLANK_LINES = re.compile(r"\n{3,}")


class Unusable(Exception):
    """A row that gives no question; its text is the reason, and quotes nothing."""


@dataclass(frozen=True)
class Question:
    """The first turn of a user.

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


def first_question(row: Row) -> Question:
    """What the user asked first.

    Raises:
        Unusable: there are no turns, a turn is damaged, no user speaks, or the first question is blank.
    """
    column = next((name for name in FORMATS if row.get(name) is not None), None)
    turns = row[column] if column is not None else None
    if column is None or not isinstance(turns, list) or not turns:
        raise Unusable("no conversation")
    said = [_turn(turn, *FORMATS[column]) for turn in turns]
    first = next((place for place, (who, _) in enumerate(said) if who in _USER), None)
    if first is None:
        raise Unusable("no turn of a user")
    text = normalised(said[first][1])
    if not text:
        raise Unusable("a blank question")
    who, reply = said[first + 1] if first + 1 < len(said) else ("", "")
    return Question(text, reply if who in _ASSISTANT and reply.strip() else None)


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
