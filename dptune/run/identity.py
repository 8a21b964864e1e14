"""Whether a run that wants to go on is the one that was saved: what both must share, compared value by value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dptune._validate import HIDDEN, refuse

_MOST_DIFFERENCES, _LONGEST_VALUE = 5, 60  # of an error's one line


def refuse_other_run(saved: Mapping[str, Any], current: Mapping[str, Any], *, where: str = "the checkpoint") -> None:
    """Refuse to resume a run as another one.

    Args:
        saved: a checkpoint's `identity`.
        current: that of the run which wants to go on; values that JSON writes alike are equal.
        where: `saved` was found, for the message.

    Raises:
        InvalidArgument: they differ; the message names what, with both values.
    """
    before, now = (dict(_leaves(json.loads(json.dumps(identity)))) for identity in (saved, current))
    values = {key: (before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in before | now}
    differing = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if not differing:
        return
    told = [
        f"{_dotted(key)} was {_shown(old)} in {where} and is {_shown(new)} now"
        for key, (old, new) in list(differing.items())[:_MOST_DIFFERENCES]
    ]
    more = f", and {len(differing) - len(told)} more differ" if len(differing) > len(told) else ""
    remedy = "resume with what the run began with, or begin another one in a new folder"
    refuse("resume_from", HIDDEN, f"{', '.join(told)}{more}; {remedy}")


_ABSENT = object()
_Key = tuple[str | int, ...]


def _leaves(value: Any, key: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    """(where, value) of everything in nested dictionaries and lists; empty ones are values."""
    if value and isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*key, name))
    else:
        yield key, value


def _dotted(key: _Key) -> str:
    """("a", "b", 2) is `a.b[2]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _shown(value: object) -> str:
    text = "absent" if value is _ABSENT else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
