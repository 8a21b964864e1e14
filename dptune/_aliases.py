"""Older names of a dataclass's fields, as flags and as keywords: the key `aliases` of a field's metadata.

The metadata hold them as flags, hyphens included, because transformers' HfArgumentParser reads them so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import Field, fields
from operator import attrgetter
from typing import Any, TypeVar

from dptune._validate import refuse

_T = TypeVar("_T")


def spellings(name: str) -> list[str]:
    """The ways to write the flag of a name: with underscores and with hyphens."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def aliases(*names: str) -> list[str]:
    """Older names as they stand in a field's metadata: each in both spellings."""
    return [spelling for name in names for spelling in spellings(name)]


def names_of(field: Field[Any]) -> list[str]:
    """The name of a field, then its older names, all with underscores."""
    older = [flag.removeprefix("--").replace("-", "_") for flag in field.metadata.get("aliases", ())]
    return list(dict.fromkeys((field.name, *older)))


def spellings_of(field: Field[Any]) -> list[str]:
    """All ways to write a field's flag, the standard name first."""
    return aliases(*names_of(field))


def canonical(groups: Iterable[Any]) -> dict[str, str]:
    """{each name, old or new: the field's name} of dataclasses."""
    return {name: field.name for group in groups for field in fields(group) for name in names_of(field)}


def with_older_keywords(cls: type[_T]) -> type[_T]:
    """Decorate a dataclass so that it also takes, and has, its fields by their older names.

    A field given by two names raises `InvalidArgument`.
    """
    older = {name: field.name for field in fields(cls) for name in names_of(field)[1:]}  # type: ignore[arg-type]
    made = cls.__init__

    @functools.wraps(made)
    def init(self: Any, *args: Any, **values: Any) -> None:
        for old in [name for name in values if name in older]:
            value, new = values.pop(old), older[old]
            if new in values:
                refuse(old, value, f"is another name of {new}, which is also given; leave one out")
            values[new] = value
        made(self, *args, **values)

    cls.__init__ = init  # type: ignore[method-assign]
    for old, new in older.items():
        setattr(cls, old, property(attrgetter(new), functools.partial(_assign, new)))
    return cls


def _assign(name: str, instance: object, value: object) -> None:
    setattr(instance, name, value)
