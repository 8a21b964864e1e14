"""Flags from a YAML file: `--config run.yaml`. Keys are flag names; values are read as words of the command line are.

Flags of the command line override the file, and a later file overrides an earlier one. A key that is no flag, stands
twice or is a secret is refused, and so is a value that the flag does not take. A training run leaves such a file of all
its flags, `config.yaml`, in its folder.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from dptune._aliases import aliases, canonical
from dptune._files import atomic_write
from dptune._validate import HIDDEN, refuse
from utils.cli.familiar_flags import nearest_flag, why_missing
from utils.cli.parser import CONFIG_FLAG

ROOT = Path(__file__).parents[2]  # of the project: the repository, or its copy in an installed package
SETTINGS_NAME = "config.yaml"  # the flags of a training run, in its folder

Value = str | list[str] | None  # None: the key stands without a value, or with null

_HEADER = "# All flags of the run's last launch but secrets; give this file to --config to launch it again.\n"
_NULL = "tag:yaml.org,2002:null"
_NEGATIVE_NUMBER = re.compile(r"-\.?\d")


class Refusing(Protocol):
    """See `utils.cli.parser.OneLineParser`."""

    def refusal_of(self, flag: str, value: str | list[str]) -> str | None:
        """Why a flag does not take a value; None if it takes it."""


def split_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the files that --config names, in order; all other words).

    Raises:
        InvalidArgument: the flag stands without a file, or twice with the same.
    """
    files, others, rest = list[str](), list[str](), list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag != CONFIG_FLAG:
            others.append(flag + equals + value)
            continue
        if not equals and not rest:
            refuse(CONFIG_FLAG, HIDDEN, "give the YAML file of flags")
        file = value if equals else rest.pop(0)
        if file in files:
            refuse(CONFIG_FLAG, file, "is given twice; leave one out")
        files.append(file)
    return files, others


def read_settings_file(file: str) -> dict[str, Value]:
    """{flag name with underscores: its words} of a YAML file. Builds no objects, whatever tags the file has.

    Raises:
        InvalidArgument: the file cannot be read, is no list of flags, or has a key twice.
    """
    import yaml  # not at the top: programs without --config need no library besides the engine's

    try:
        top = yaml.compose(_path_of(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        refuse(CONFIG_FLAG, file, f"cannot be read ({reason}); give a YAML file of flags")
    except yaml.YAMLError as error:  # its text quotes the file, which may hold a secret
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}"
        refuse(CONFIG_FLAG, file, f"is not YAML ({getattr(error, 'problem', None) or 'unreadable'}{where})")
    if not isinstance(top, yaml.MappingNode):
        refuse(CONFIG_FLAG, file, "holds no flags; write them as `learning_rate: 3e-4`, one on each line")
    found: dict[str, Value] = {}
    for key_node, node in top.value:
        if not isinstance(key_node, yaml.ScalarNode):
            refuse(CONFIG_FLAG, file, f"the key in line {key_node.start_mark.line + 1} is no flag name")
        key = key_node.value.replace("-", "_")
        if key in found:
            refuse(CONFIG_FLAG, file, f"{key} stands twice, again in line {key_node.start_mark.line + 1}; keep one")
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            refuse(CONFIG_FLAG, file, f"{key} holds more than one value or a list of values")
        if isinstance(node, yaml.SequenceNode):
            found[key] = [part.value for part in parts]
        else:
            found[key] = None if node.tag == _NULL else node.value
    return found


def _path_of(file: str) -> Path:
    """The file, or one of the project's own, such as a recipe, if there is none by that path in the current folder."""
    own = ROOT / file
    return own if own.is_file() and not Path(file).exists() else Path(file)


def with_settings(words: Sequence[str], groups: Sequence[type], parser: Refusing) -> list[str]:
    """A command line in which the flags of its --config files stand first, so that all others override them.

    Args:
        words: the command line without the program's name.
        groups: the dataclasses of the program's flags.
        parser: the parser of these flags.

    Raises:
        InvalidArgument: the file is refused. The message names the file and the key; no value of a secret or of an
            unknown key.
    """
    files, others = split_config(words)
    first = [word for file in files for word in _words_of_file(file, groups, parser)]
    return [*first, *others]


def _words_of_file(file: str, groups: Sequence[type], parser: Refusing) -> list[str]:
    """The words of one file."""
    fields = {one.name: one for group in groups for one in dataclasses.fields(group)}
    names, found = canonical(groups), dict[str, str]()  # {field: the key that sets it}
    words: list[str] = []
    for key, value in read_settings_file(file).items():
        if key not in names:
            _refuse_unknown(file, key, list(names))
        field = fields[names[key]]
        if field.name in found:
            refuse(CONFIG_FLAG, file, f"{key} is another name of {found[field.name]}, which it also holds; keep one")
        if not field.repr:
            told = field.metadata.get("help", "give it on the command line")
            refuse(CONFIG_FLAG, file, f"{key} is a secret, which no file should hold: remove it ({told})")
        found[field.name] = key
        words += _words_of(file, field, value, parser)
    return words


def given_in_file(words: Sequence[str], groups: Sequence[type]) -> set[str]:
    """Names of the fields that the --config files set, other than to the default as `write_settings` writes it.

    So the file that a run leaves, with all flags, says no more than the command line that began the run.
    """
    settings: dict[str, Value] = {}
    names = canonical(groups)
    for file in split_config(words)[0]:
        settings |= {names.get(key, key): value for key, value in read_settings_file(file).items()}
    defaults = {one.name: _default(one) for group in groups for one in dataclasses.fields(group)}
    return {name for name, value in settings.items() if value is not None and value != defaults.get(name)}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write `config.yaml`: flags with their values, which are JSON values; those without a value are left out."""
    lines = [f"{name}: {_as_yaml(value)}\n" for name, value in settings.items() if value is not None]
    with atomic_write(folder / SETTINGS_NAME) as file:
        file.write(_HEADER + "".join(lines))


def _refuse_unknown(file: str, key: str, names: Sequence[str]) -> NoReturn:
    """The value is not shown: a misspelt access_token must not print the token."""
    if reason := why_missing(key):
        refuse(CONFIG_FLAG, file, f"{key}: {reason}")
    near = nearest_flag(f"--{key}", aliases(*names))
    hint = "" if near is None else f" (did you mean {near.removeprefix('--')}?)"
    refuse(CONFIG_FLAG, file, f"unknown key: {key}{hint}; --help lists the flags, whose names are the keys")


def _words_of(file: str, field: dataclasses.Field[Any], value: Value, parser: Refusing) -> list[str]:
    """The words of one flag; none for a null that is the flag's default."""
    name = field.name
    if value is None:
        if field.default is not None:
            refuse(CONFIG_FLAG, file, f"{name} has no value; give one, or leave the key out")
        return []
    reason = "give at least one value, or leave the key out" if value == [] else parser.refusal_of(f"--{name}", value)
    if reason is not None:
        refuse(CONFIG_FLAG, file, f"{name}={value!r}: {reason}")
    if isinstance(value, str):
        return [f"--{name}={value}"]  # in one word, so that the value may begin with a hyphen
    if len(value) == 1:
        return [f"--{name}={value[0]}"]
    for word in value:
        if word.startswith("-") and not _NEGATIVE_NUMBER.match(word):
            refuse(CONFIG_FLAG, file, f"{name}={value!r}: no value of a list may begin with a hyphen")
    return [f"--{name}", *value]


def _default(field: dataclasses.Field[Any]) -> object:
    """A field's default as words, like those of a file; MISSING if it has none."""
    factory = field.default_factory
    value = field.default if factory is dataclasses.MISSING else factory()
    return [_as_word(one) for one in value] if isinstance(value, list) else _as_word(value)


def _as_word(value: Any) -> Any:
    """The word that `write_settings` writes for a value; anything but a JSON value stays as it is."""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


def _as_yaml(value: Any) -> str:
    """JSON is YAML too, and needs no rules for quotes."""
    return json.dumps(value, ensure_ascii=False)
