"""A command line from dataclasses, with argparse: each field is a flag, each dataclass a titled group of --help.

transformers' HfArgumentParser does the same, but takes seconds to import. A field's type is str, int, float, bool, a
list of one of these, or one of all these or None; `float | Literal["auto"]` is a number or that word. Its metadata may
hold `help`, `choices` and `aliases`, older names of the flag (`dptune._aliases`). A field without a default is
required; if its metadata holds `positional`, it is a word without a flag. `--flag_name` and `--flag-name` are the same
flag. A bool is set by `--x` or `--x false`, and if it defaults to True also by `--no_x`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from dptune._aliases import spellings, spellings_of

CONFIG_FLAG = "--config"

_TRUE, _FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
# Seconds that other ranks wait, so that the main process can print the error and the launcher end all ranks.
_MAIN_PROCESS_FIRST = 3.0


class OneLineParser(argparse.ArgumentParser):
    """Prints an error on one line, without the usage of all flags."""

    def add_config_flag(self) -> None:
        """List --config in --help. `utils.cli.settings_file` reads it, so that no parsed value holds it."""
        told = "YAML file of these flags; later files and flags override it (docs/reference/command.md)"
        self.add_argument(CONFIG_FLAG, metavar="FILE", default=argparse.SUPPRESS, help=told)

    def refusal_of(self, flag: str, value: str | list[str]) -> str | None:
        """Why a flag does not take a value; None if it takes it.

        Args:
            flag: with hyphens before its name.
            value: one word, or a list for a flag that takes several.
        """
        action = self._option_string_actions[flag]
        if isinstance(value, list) and action.nargs not in ("+", "*"):
            return "give one value, not a list"
        try:
            self._get_values(action, [value] if isinstance(value, str) else value)
        except argparse.ArgumentError as error:
            return error.message
        return None

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        exit_with(f"{' '.join(message.split())} (--help lists the flags)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action, argparse._StoreFalseAction):
            return f"turns off --{action.dest}"
        return action.help if action.default is None else super()._get_help_string(action)


class DataclassParser(OneLineParser):
    """Flags for the fields of `groups`.

    Args:
        groups: dataclasses; a class attribute `_argument_group_name` titles each.
        description: printed above the flags; line breaks are kept.
    """

    def __init__(self, groups: Sequence[type], description: str | None = None) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.add_config_flag()
        self._groups = groups
        for group in groups:
            section = self.add_argument_group(getattr(group, "_argument_group_name", group.__name__))
            types = get_type_hints(group)
            for field in dataclasses.fields(group):
                _add_flag(section, field, types[field.name])

    def unknown_words(self, args: Sequence[str] | None) -> list[str]:
        """Words that belong to no flag."""
        return self.parse_known_args(args)[1]

    def parse_groups(self, args: Sequence[str] | None) -> list[Any]:
        """One filled instance of each dataclass in order."""
        values = vars(self.parse_known_args(args)[0])
        return [one(**{f.name: values[f.name] for f in dataclasses.fields(one)}) for one in self._groups]


def exit_with(message: str) -> NoReturn:
    """Print `error: message` and exit with status 2. Ranks other than 0 let rank 0 print first."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # If rank 0 fails too, the launcher ends this process in its sleep. Exiting at once could end rank 0 unheard.
        time.sleep(_MAIN_PROCESS_FIRST)
        print(f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _add_flag(section: argparse._ArgumentGroup, field: dataclasses.Field[Any], type_: Any) -> None:
    kind, is_list = _kind_of(type_)
    how: dict[str, Any] = {name: value for name, value in field.metadata.items() if name != "aliases"}
    if field.default_factory is not dataclasses.MISSING:
        how["default"] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        how["default"] = field.default
    else:
        how["required"] = True
    if kind is bool:
        how |= {"nargs": "?", "const": True}
    elif is_list:
        how["nargs"] = "+"
    if how.pop("positional", False):
        del how["required"]
        section.add_argument(field.name, metavar=field.name.upper(), type=kind, **how)
        return
    section.add_argument(*spellings_of(field), type=_bool if kind is bool else kind, **how)
    if kind is bool and field.default is True:
        off = f"turns off --{field.name}"
        section.add_argument(*spellings(f"no_{field.name}"), dest=field.name, action="store_false", help=off)


def _kind_of(type_: Any) -> tuple[Callable[[str], Any], bool]:
    """(function that converts one word, whether the flag takes several) of a field's type."""
    words: tuple[str, ...] = ()
    if get_origin(type_) in (Union, UnionType):
        others = [one for one in get_args(type_) if one is not type(None)]
        words = tuple(word for one in others if get_origin(one) is Literal for word in get_args(one))
        (type_,) = (one for one in others if get_origin(one) is not Literal)
    is_list = get_origin(type_) is list
    kind = get_args(type_)[0] if is_list else type_
    if kind not in (str, int, float, bool):
        raise TypeError(f"{type_} cannot be the type of a flag")
    return _or_word(kind, words) if words else kind, is_list


def _or_word(kind: Callable[[str], Any], words: Sequence[str]) -> Callable[[str], Any]:
    """Converts a word as `kind` does, but leaves these `words` as they are."""

    def convert(word: str) -> Any:
        try:
            return word if word in words else kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"give a number or {' or '.join(words)}, not {word!r}") from None

    return convert


def _bool(word: str) -> bool:
    if word.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"give true or false, not {word!r}")
    return word.lower() in _TRUE
