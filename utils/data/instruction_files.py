r"""Reads files of instructions into a list with one entry per text to generate.

    lines         plain text, one instruction per line
    repeated      text lines `instruction #### repetitions`
    json          a JSON list of strings or of objects with `instruction`, or JSONL of such objects
    alpaca_eval   AlpacaEval's list of objects with `instruction` and `dataset` (an `output` is ignored)

Both text formats skip blank lines. Inside an instruction, \n is a line break and \\ a backslash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dptune._validate import refuse
from utils.data.forms import joined_input
from utils.data.lost_columns import lost_column
from utils.files.cells import is_text
from utils.files.tables import parse_json

SEPARATOR = "####"
FLAG = "--instruction_file"
_ESCAPES = {r"\n": "\n", r"\\": "\\"}
_REPEATED_REMEDY = f"write `instruction {SEPARATOR} repetitions`"
_JSON_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class Instruction:
    """The instruction of one text to generate. `dataset` is AlpacaEval's name for its source."""

    text: str
    dataset: str | None = None


@dataclass(frozen=True)
class InstructionFile:
    """The instructions of a file in order, repeated as it says, and the file's format."""

    instructions: list[Instruction]
    format: str

    @property
    def texts(self) -> list[str]:
        """The texts of the instructions."""
        return [one.text for one in self.instructions]


def read_instructions(path: str, kind: str = "auto") -> InstructionFile:
    """The instructions of a file.

    Args:
        path: a file of UTF-8 text.
        kind: one of INSTRUCTION_FORMATS. "auto" takes valid JSON as JSON, other text with `####` in any
            line as "repeated" (then every line needs it), and the rest as "lines".

    Raises:
        InvalidArgument: the file is not UTF-8, has no instruction, or does not follow its format (names the line or
            entry).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse(FLAG, path, f"cannot be read ({type(error).__name__}); give a text file in UTF-8")
    kind = _recognise(path, text) if kind == "auto" else kind
    instructions = _READERS[kind](path, text)
    if not instructions:
        refuse(FLAG, path, f"holds no instruction; write lines `instruction {SEPARATOR} repetitions`")
    return InstructionFile(instructions, kind)


def _recognise(path: str, text: str) -> str:
    """The format, judged by the content. Text may begin with a bracket, but a file named .json must be JSON."""
    if text.lstrip()[:1] in ("[", "{") or Path(path).suffix.lower() in _JSON_SUFFIXES:
        entries = _parse(path, text)
        if entries is not None:
            marked = any(isinstance(entry, dict) and entry.keys() & {"dataset", "generator"} for entry in entries)
            return "alpaca_eval" if marked and text.lstrip().startswith("[") else "json"
        if Path(path).suffix.lower() in _JSON_SUFFIXES:
            return "json"  # its reader says what is wrong
    return "repeated" if SEPARATOR in text else "lines"


def _read_lines(path: str, text: str) -> list[Instruction]:  # noqa: ARG001  # all readers have the same signature
    return [Instruction(_unescaped(line)) for line in text.split("\n") if line.strip()]


def _read_repeated(path: str, text: str) -> list[Instruction]:
    lines = enumerate(text.split("\n"), start=1)
    return [one for number, line in lines if line.strip() for one in _read_repeated_line(path, number, line)]


def _read_repeated_line(path: str, number: int, line: str) -> list[Instruction]:
    """The instruction of one line, repeated as it says."""
    instruction, separator, repetitions = line.rpartition(SEPARATOR)
    if not separator:
        refuse(FLAG, path, f"line {number} has no {SEPARATOR}; {_REPEATED_REMEDY}")
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", repetitions.strip(), re.ASCII):
        given = repetitions.strip() or "nothing"
        refuse(FLAG, path, f"line {number} has {given} after {SEPARATOR}; write a whole number of at least 1")
    return [Instruction(_unescaped(instruction))] * int(repetitions)


def _unescaped(instruction: str) -> str:
    return re.sub(r"\\[n\\]", lambda found: _ESCAPES[found[0]], instruction.strip())


def _read_json(path: str, text: str) -> list[Instruction]:
    return [Instruction(_text_of(path, number, entry)) for number, entry in _entries(path, text)]


def _read_alpaca_eval(path: str, text: str) -> list[Instruction]:
    return [
        Instruction(_text_of(path, number, entry), _dataset_of(path, number, entry))
        for number, entry in _entries(path, text)
    ]


def _entries(path: str, text: str) -> list[tuple[int, object]]:
    """(number from 1, entry) for each entry of a JSON list or of JSONL."""
    entries = _parse(path, text)
    if entries is None:
        refuse(FLAG, path, "neither a JSON list nor one JSON object per line; fix it, or see --instruction_format")
    return list(enumerate(entries, start=1))


def _parse(path: str, text: str) -> list[object] | None:
    """The entries of a JSON list, or of JSONL; None if it is neither."""
    try:
        content = parse_json(text, FLAG, path)
    except json.JSONDecodeError:
        pass
    else:
        return content if isinstance(content, list) else [content] if isinstance(content, dict) else None
    lines = enumerate(text.split("\n"), start=1)
    try:
        entries = [parse_json(line, FLAG, path, number) for number, line in lines if line.strip()]
    except json.JSONDecodeError:
        return None
    return entries if all(isinstance(entry, dict) for entry in entries) else None


def _text_of(path: str, number: int, entry: object) -> str:
    """A string, or an object's `instruction` with its `input` below it."""
    row = entry if isinstance(entry, dict) else {"instruction": entry}
    text, given = row.get("instruction"), row.get("input") or ""
    if not is_text(text):
        refuse(FLAG, path, f"entry {number} is neither text nor an object with text as its instruction; fix it")
    if not is_text(given):
        refuse(FLAG, path, f"entry {number} has an input that is no text; give a string, or leave it out")
    if (name := lost_column(row, ("input",))) is not None:
        shown = " ".join(name.split())
        refuse(FLAG, path, f"{shown} of entry {number} would be left out; join it to the instruction, or drop it")
    return joined_input(str(text), str(given))


def _dataset_of(path: str, number: int, entry: object) -> str | None:
    dataset = entry.get("dataset") if isinstance(entry, dict) else None
    if not (dataset is None or isinstance(dataset, str)):
        refuse(FLAG, path, f"entry {number} has a dataset that is not a string; give its name")
    return dataset


_READERS: dict[str, Callable[[str, str], list[Instruction]]] = {
    "lines": _read_lines,
    "repeated": _read_repeated,
    "json": _read_json,
    "alpaca_eval": _read_alpaca_eval,
}
INSTRUCTION_FORMATS = ("auto", *_READERS)
