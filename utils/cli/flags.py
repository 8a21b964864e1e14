"""Command lines of the programs: flags from dataclasses; a mistake prints one line and exits with status 2.

Every program parses with `parse` and runs inside `exit_on_invalid_argument`, which turns the engine's parameter names
into flags. A field declared with `repr=False` is a secret: it is left out of `repr` and `public_config`, and removed
from `sys.argv` after parsing, since trackers record the command line.
"""

from __future__ import annotations

import dataclasses
import errno
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from dptune._aliases import canonical, names_of, spellings, spellings_of
from dptune._validate import HIDDEN, InvalidArgument, refuse
from utils.cli.familiar_flags import nearest_flag, why_missing
from utils.cli.parser import CONFIG_FLAG, DataclassParser, exit_with
from utils.cli.settings_file import given_in_file, split_config, with_settings

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# A path that the user named cannot be read or written.
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG)
_NO_RENAMES: Mapping[str, str] = MappingProxyType({})


class GroupParser(Protocol):
    """See `utils.cli.parser.DataclassParser`."""

    def unknown_words(self, args: Sequence[str] | None) -> list[str]:
        """Words that belong to no flag."""

    def parse_groups(self, args: Sequence[str] | None) -> list[Any]:
        """One filled instance of each dataclass in order."""

    def refusal_of(self, flag: str, value: str | list[str]) -> str | None:
        """Why a flag does not take a value; None if it takes it."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""


def parse(
    *groups: type,
    args: Sequence[str] | None = None,
    description: str | None = None,
    parser: Callable[[Sequence[type], str | None], GroupParser] = DataclassParser,
) -> tuple[Any, ...]:
    """One filled instance of each dataclass, in order.

    Args:
        groups: dataclasses whose fields become flags; a class attribute `_argument_group_name` titles them.
        args: the command line without the program's name; `sys.argv[1:]` if None, where secrets are then overwritten.
        description: what --help prints above the flags; line breaks are kept.
        parser: makes the parser from both; for fields with types that `DataclassParser` does not take, give another.

    Besides these flags every program takes `--config FILE` (`utils.cli.settings_file`).

    Exits with status 2 and one line for an unknown, missing or malformed flag. An abbreviated flag counts as unknown:
    its meaning would change when a flag is added. Raises `InvalidArgument` if a dataclass refuses a value, or if the
    file is refused.
    """
    made = parser(groups, description)
    line = sys.argv[1:] if args is None else args
    _refuse_two_names(line, groups)
    words = with_settings(line, groups, made)
    if unknown := made.unknown_words(words):  # first, because a value may be missing that has another flag's name
        if args is None:
            _overwrite_secrets(sys.argv, groups)
        made.error(_describe_unknown(unknown, groups))
    filled = made.parse_groups(words)
    if args is None:
        _overwrite_secrets(sys.argv, groups)
    return tuple(filled)


def given_fields(args: Sequence[str] | None, groups: Sequence[type]) -> set[str]:
    """Names of the fields whose flags stand in a command line, in any spelling, with their default value too.

    A --config file counts as well, except for keys that hold the default (see `given_in_file`).

    Args:
        args: the command line without the program's name; `sys.argv[1:]` if None.
        groups: the dataclasses of the program's flags.
    """
    line = sys.argv[1:] if args is None else args
    words = {word.partition("=")[0] for word in split_config(line)[1]}
    fields = [f for one in groups for f in dataclasses.fields(one)]
    on_line = {f.name for f in fields if words.intersection((*spellings_of(f), *spellings(f"no_{f.name}")))}
    return on_line | given_in_file(line, groups)


def refuse_unread(given: Collection[str], names: Iterable[str], remedy: str, *instances: Any) -> None:
    """Refuse flags that were given although this run would not read them.

    Args:
        given: see `given_fields`.
        names: fields that are not read.
        remedy: why, and what to do instead.
        instances: the filled dataclasses, for the value in the message.

    Raises:
        InvalidArgument: one of `names` was given.
    """
    values = {f.name: getattr(one, f.name) for one in instances for f in dataclasses.fields(one)}
    for name in names:
        if name in given:
            refuse(f"--{name}", values[name], remedy)


def public_config(*instances: Any) -> dict[str, Any]:
    """The fields of all instances in one flat dict for saving and logging, without secrets (`repr=False`)."""
    return {f.name: getattr(one, f.name) for one in instances for f in dataclasses.fields(one) if f.repr}


@contextmanager
def naming(flags: Mapping[str, str]) -> Iterator[None]:
    """Rename parameters in errors raised inside: {parameter name in the error: flag}.

    For code that passes a flag's value on under another name. Names that are not in `flags` stay unchanged.
    """
    try:
        yield
    except InvalidArgument as error:
        key = error.name.removeprefix("--")
        if key not in flags:
            raise
        raise InvalidArgument(flags[key], error.value, error.remedy) from error


@contextmanager
def exit_on_invalid_argument(*groups: type, flags: Mapping[str, str] = _NO_RENAMES) -> Iterator[None]:
    """Turn an `InvalidArgument` raised inside, a full disk or a path that cannot be used into one line on stderr and
    exit status 2.

    Also a decorator. With several ranks only the main process prints, unless the error occurs on another rank only.

    Args:
        groups: the dataclasses of the program's flags. A parameter named like a field is shown as its flag.
        flags: {parameter: flag} for parameters with other names, such as {"rank": "--lora_r"}.
    """
    fields = {name: f"--{new}" for name, new in canonical(groups).items()}
    try:
        with naming(fields | dict(flags)):
            yield
    except InvalidArgument as error:
        exit_with(str(error))
    except OSError as error:
        if error.errno in _DISK_FULL:
            told = f"{error.filename or 'a file'} was not written; free space and run the command again"
        elif error.errno in _UNUSABLE and error.filename is not None:
            told = f"{error.filename} cannot be used; check the path and who may read and write it"
        else:
            raise
        exit_with(f"{error.strerror}: {told}")


def _flags(groups: Sequence[type], *, secret_only: bool = False) -> list[str]:
    """All flags, or those of secrets, in each spelling of the parser (with underscores and with hyphens)."""
    fields = [f for one in groups for f in dataclasses.fields(one) if not (secret_only and f.repr)]
    return [spelling for f in fields for spelling in spellings_of(f)]


def _refuse_two_names(line: Sequence[str], groups: Sequence[type]) -> None:
    """Refuse a flag that stands in a command line under two of its names."""
    words = {word.partition("=")[0] for word in line}
    for field in (f for one in groups for f in dataclasses.fields(one)):
        given = [f"--{name}" for name in names_of(field) if words.intersection(spellings(name))]
        if len(given) > 1:
            refuse(f"--{field.name}", HIDDEN, f"is given as {' and as '.join(given)}; leave one out")


def _overwrite_secrets(argv: list[str], groups: Sequence[type]) -> None:
    """Replace the values of secret flags in `argv`, in place."""
    secret = set(_flags(groups, secret_only=True))
    for position, word in enumerate(argv):
        flag, equals, _ = word.partition("=")
        if flag in secret and equals:
            argv[position] = f"{flag}=***"
        elif flag in secret and position + 1 < len(argv):
            argv[position + 1] = "***"


def _describe_unknown(unknown: Sequence[str], groups: Sequence[type]) -> str:
    """A message that names unknown flags without their values: a misspelt --access_token must not print the token."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    if not flags:
        return f"{len(unknown)} value(s) that belong to no flag; quote a value that holds spaces"
    for flag in flags:
        if reason := why_missing(flag.removeprefix("--")):
            return f"{flag}: {reason}"
    own = [*_flags(groups), CONFIG_FLAG]
    near = [nearest_flag(flag, own) for flag in flags]
    hints = [f"{flag} (did you mean {one}?)" if one else flag for flag, one in zip(flags, near, strict=True)]
    return f"unknown flag: {', '.join(hints)}"
