"""Saves rows that cost time or money as soon as they are made, so that a resumed run makes no row twice.

A journal is one or more JSONL files in the folder of a run. A JSON file beside them holds the inputs and settings that
determine the rows, so a folder never mixes rows of two runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dptune._files import append_line
from dptune._validate import refuse
from utils.files.jsonl import json_line, write_json

_FLAG = "--output_dir"
_LONGEST_SHOWN = 60


@dataclass(frozen=True)
class Journal:
    """The rows of one run.

    Attributes:
        folder: the folder of --output_dir.
        config_name: name of the file with inputs and settings.
        row_files: names, or name patterns, of the files of rows, in reading order.
        noun: what the rows are, in the plural, for messages.
    """

    folder: Path
    config_name: str
    row_files: tuple[str, ...]
    noun: str

    def files(self) -> list[Path]:
        """The existing files of rows, in reading order."""
        return [path for name in self.row_files for path in sorted(self.folder.glob(name))]

    def refuse_other_run(self, identity: Mapping[str, object]) -> None:
        """Refuse the folder unless a run with this identity may write into it.

        Args:
            identity: inputs and settings that determine the rows, JSON values by name. None equals a missing name.

        Raises:
            InvalidArgument: the folder holds rows of another run. The message names what differs.
        """
        if self.folder.exists() and not self.folder.is_dir():
            refuse(_FLAG, str(self.folder), "is a file; give a folder")
        if not self.files():
            return
        there = self._read_config()
        changes = ", ".join(
            f"{name} was {_shown(there.get(name))} and is {_shown(identity.get(name))}"
            for name in {**there, **identity}
            if there.get(name) != identity.get(name)
        )
        if changes:
            remedy = "give another folder, or resume with the same input and settings"
            refuse(_FLAG, str(self.folder), f"holds {self.noun} of another run ({changes}); {remedy}")

    def recorded(self, name: str) -> object:
        """One value of the identity of the rows that are there; None without rows or without that value."""
        return self._read_config().get(name) if self.files() else None

    def claim(self, identity: Mapping[str, object]) -> None:
        """Create the folder if needed and record the identity of its rows. Raises like `refuse_other_run`.

        If an earlier run left no row, its identity is replaced.
        """
        self.refuse_other_run(identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.files():
            write_json(self.folder / self.config_name, identity)

    def append(self, name: str, row: Mapping[str, object]) -> None:
        """Append a row to the file `name`; the row is on disk when this returns."""
        append_line(self.folder / name, json_line(row))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every complete row, file by file. Skips rows cut by a crash: part of a JSON object is not valid JSON."""
        for path in self.files():
            with path.open("rb") as lines:  # bytes: only a line feed ends a row, and a crash may cut a character
                for line in lines:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue

    def _read_config(self) -> dict[str, object]:
        path = self.folder / self.config_name
        if not path.exists():
            refuse(_FLAG, str(self.folder), f"holds {self.noun} but no {self.config_name}; give another folder")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            config = None
        if not isinstance(config, dict):
            refuse(_FLAG, str(self.folder), f"its {self.config_name} is not a JSON object; give another folder")
        return config


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
