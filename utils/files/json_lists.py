"""Reads a JSON list value by value with the standard library, so that a large one stays on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import IO

Decode = Callable[[str, int], tuple[object, int]]  # (text, where a value begins) -> (the value, where it ends)

_AT_ONCE = 1 << 16  # characters
_LONGEST_WORD = 16  # characters of a number's sign or of a word such as -Infinity, which the end of a part may cut
_SPACE = re.compile(r"[ \t\n\r]*")


class JSONList:
    """The values of a JSON list in a file, in order.

    Args:
        file: text, read from where it stands.
        decode: decodes one value; `json.JSONDecoder.raw_decode`, for example.
    """

    def __init__(self, file: IO[str], decode: Decode) -> None:
        self._file, self._decode = file, decode
        self._text, self._at = "", 0
        self._line, self._column = 1, 1  # where `_text` begins in the file
        self._has_ended = False

    def begins_list(self) -> bool:
        """Whether the file's first sign is that of a list. Call it first."""
        return self._sign() == "["

    def values(self) -> Iterator[object]:
        """Each value of the list.

        Raises:
            JSONDecodeError: the file is not a JSON list; with the line and column in the file.
        """
        self._at += 1
        if self._sign() == "]":
            self._end()
            return
        while True:
            yield self._value()
            sign = self._sign()
            if sign not in (",", "]"):
                raise self._error("Expecting ',' delimiter", self._at)
            if sign == "]":
                break
            self._at += 1
        self._end()

    def _end(self) -> None:
        """Nothing may follow the list."""
        self._at += 1
        if self._sign():
            raise self._error("Extra data", self._at)

    def _sign(self) -> str:
        """The next sign that is no white space; "" at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = self._at if found is None else found.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _value(self) -> object:
        self._sign()
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._is_cut(error) or not self._more():
                    raise self._error(error.msg, error.pos) from None
                continue
            return value

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the value may be whole in the file, although it is not in what was read."""
        return error.pos >= len(self._text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")

    def _more(self) -> bool:
        """Read on, as much again as a value takes so far; forget what is before it. False at the file's end."""
        if self._has_ended:
            return False
        part = self._file.read(max(_AT_ONCE, len(self._text) - self._at))
        self._has_ended = not part
        if part:
            self._line, self._column = self._place(self._at)
            self._text, self._at = self._text[self._at :] + part, 0
        return not self._has_ended

    def _place(self, at: int) -> tuple[int, int]:
        """(line, column) in the file of a position in `_text`."""
        before = self._text[:at]
        lines = before.count("\n")
        return self._line + lines, len(before) - before.rfind("\n") if lines else self._column + at

    def _error(self, told: str, at: int) -> json.JSONDecodeError:
        error = json.JSONDecodeError(told, "", 0)
        error.lineno, error.colno = self._place(at)
        return error
