"""Command lines of the scripts: dataclasses in, one line and exit status 2 out when something is wrong.

Every script parses with `parse` and runs inside `exit_on_invalid_argument`. A field declared with `repr=False` is a
secret: it is left out of `repr`, of `public_config` and, once parsed, of `sys.argv` (trackers record the command line).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers import HfArgumentParser

from dptune._validate import InvalidArgument

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Seconds another rank gives the main process to print the same mistake, and the launcher to end all ranks after it.
_MAIN_PROCESS_FIRST = 3.0


def parse(*dataclass_types: type, args: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """One filled instance of each dataclass, in order.

    Args:
        dataclass_types: dataclasses whose fields become flags; a class attribute `_argument_group_name` titles them.
        args: the command line without the program's name; `sys.argv[1:]` if None, where secrets are then overwritten.
        description: what --help prints above the flags; line breaks are kept.

    Exits with status 2 and one line for an unknown, missing or malformed flag. Abbreviated flags are unknown: they
    would change their meaning when a flag is added. Raises `InvalidArgument` where a dataclass refuses a value.
    """
    parser = _OneLineParser(
        dataclass_types, description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    # A file next to the script named like it is not read: what ran should be what the command line says.
    *filled, unknown = parser.parse_args_into_dataclasses(
        args=args, return_remaining_strings=True, look_for_args_file=False
    )
    if args is None:
        _overwrite_secrets(sys.argv, dataclass_types)
    if unknown:
        parser.error(_describe_unknown(unknown, dataclass_types))
    return tuple(filled)


def public_config(*instances: Any) -> dict[str, Any]:
    """The fields of all instances in one flat dict, secrets (`repr=False`) left out: fit for saving and logging."""
    return {f.name: getattr(one, f.name) for one in instances for f in dataclasses.fields(one) if f.repr}


@contextmanager
def exit_on_invalid_argument() -> Iterator[None]:
    """Turn an `InvalidArgument` raised inside, or a full disk, into one line on stderr and exit status 2.

    Also a decorator: `@exit_on_invalid_argument()`. On several ranks the main process alone prints, unless the mistake
    is seen on another rank only.
    """
    try:
        yield
    except InvalidArgument as error:
        _exit_with(str(error))
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        _exit_with(
            f"{error.strerror}: {error.filename or 'a file'} is not written; free space, then run the line again"
        )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown where there is one, line breaks of the description kept."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[0].startswith("--no_"):  # the parser gives it the help of the flag that it turns off
            return f"turns off --{action.dest}"
        return action.help if action.default is None else super()._get_help_string(action)


class _OneLineParser(HfArgumentParser):
    """Prints a mistake alone, without the usage of all flags around it."""

    def error(self, message: str) -> NoReturn:
        _exit_with(f"{' '.join(message.split())} (--help lists the flags)")


def _exit_with(message: str) -> NoReturn:
    """Print `error: message` and exit with status 2; ranks other than the first let the first speak."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # When rank 0 fails too, the launcher ends this process while it sleeps; exiting first could end rank 0 unheard.
        time.sleep(_MAIN_PROCESS_FIRST)
        print(f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _flags(dataclass_types: Sequence[type], *, secret_only: bool = False) -> list[str]:
    """All flags, or those of secrets, as the parser spells them (with underscores and with hyphens)."""
    names = [f.name for one in dataclass_types for f in dataclasses.fields(one) if not (secret_only and f.repr)]
    return [f"--{spelling}" for name in names for spelling in (name, name.replace("_", "-"))]


def _overwrite_secrets(argv: list[str], dataclass_types: Sequence[type]) -> None:
    """Replace the values of secret flags in `argv`, in place."""
    secret = set(_flags(dataclass_types, secret_only=True))
    for position, word in enumerate(argv):
        flag, equals, _ = word.partition("=")
        if flag in secret and equals:
            argv[position] = f"{flag}=***"
        elif flag in secret and position + 1 < len(argv):
            argv[position + 1] = "***"


def _describe_unknown(unknown: Sequence[str], dataclass_types: Sequence[type]) -> str:
    """Name unknown flags without their values: a misspelt --access_token must not print the token."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    if not flags:
        return f"{len(unknown)} value(s) that belong to no flag; quote a value that holds spaces"
    close = [difflib.get_close_matches(flag, _flags(dataclass_types), n=1) for flag in flags]
    hints = [f"{flag} (did you mean {near[0]}?)" if near else flag for flag, near in zip(flags, close, strict=True)]
    return f"unknown flag: {', '.join(hints)}"
