"""Words of messages that users read."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural unless there is one; the noun must form it with an s.

    >>> counted(1, "step"), counted(0, "step"), counted(1200, "noisy step")
    ('1 step', '0 steps', '1,200 noisy steps')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
