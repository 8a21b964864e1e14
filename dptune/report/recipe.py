"""The command line that repeats a run, for its model card.

Only what may be published enters it: numbers, switches, and words that the program itself offers as choices. Every
other text may be a path or a name of the user's, so a placeholder in capitals stands for it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

_PLAIN = re.compile(r"[\w.*/=+-]+")  # needs no quotes in a shell or in Markdown
_WIDTH = 96  # columns
_INSIDE = "\0"  # for a space where no line may break


def command_line(
    program: str,
    *groups: Any,
    always: Collection[str] = (),
    never: Collection[str] = (),
    shown: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> str:
    r"""The command line with which `program` takes the settings in `groups`, wrapped with backslashes.

    Args:
        program: the words before the flags.
        groups: filled dataclasses whose fields are the program's flags. Fields with `repr=False` are secrets.
        always: flags to state even at their default; the others are stated only if they differ from it.
        never: flags to leave out.
        shown: flags whose texts may be published as they are, such as names of layers.
        names: {flag: the text to publish instead of its value, even if that is the default}.

    >>> from dataclasses import make_dataclass
    >>> Flags = make_dataclass("Flags", [("rows", str), ("rank", int, 16), ("quiet", bool, False)])
    >>> command_line("train.py", Flags("/home/ann/rows.json", 4))
    'train.py --rows ROWS --rank 4'
    """
    replaced = names or {}
    words = [program]
    for group in groups:
        for field in fields(group):
            value = replaced.get(field.name, getattr(group, field.name))
            if field.name in never or not field.repr or value is None or value is False is _default(field):
                continue
            if field.name in (*always, *replaced) or value != _default(field):
                words.append(" ".join(_words(field, value, (*shown, *replaced))))
    # A flag and its values stay on one line if they fit.
    joined = " ".join(word.replace(" ", _INSIDE) if len(word) < _WIDTH - 4 else word for word in words)
    lines = textwrap.wrap(joined, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace(_INSIDE, " ")


def _default(field: Field[Any]) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _words(field: Field[Any], value: object, shown: Collection[str]) -> Iterator[str]:
    """The words of one flag."""
    if isinstance(value, bool):
        yield f"--{field.name}" if value else f"--no_{field.name}"
        return
    yield f"--{field.name}"
    offered = field.metadata.get("choices") or ()
    for one in value if isinstance(value, list | tuple) else [value]:
        word = str(one.value if isinstance(one, Enum) else one)
        known = isinstance(one, int | float | Enum) or word in offered or field.name in shown
        yield word if known and _PLAIN.fullmatch(word) else field.name.upper()
