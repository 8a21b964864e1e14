"""Where generated texts are kept while they are drawn: an interrupted run continues, no text is lost or doubled.

Each rank appends to a file of its own, `generations.rank<r>.jsonl`; the main process merges them into
`generations.jsonl` once every text is there. `generation_config.json` says what drew them: a folder never holds texts
of two configurations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from dptune._files import append_line, atomic_write
from dptune._validate import refuse

CONFIG_FILE = "generation_config.json"
FINAL_FILE = "generations.jsonl"
_RANK_FILES = "generations.rank*.jsonl"


class Row(TypedDict):
    """One generated text. `ended`: the model closed it itself, it was not cut at the length limit."""

    prompt: str
    text: str
    index: int
    ended: bool


def refuse_other_run(output_dir: Path, identity: Mapping[str, Any]) -> None:
    """Raise `InvalidArgument`, naming what differs, if `output_dir` holds texts drawn with anything but `identity`."""
    config = output_dir / CONFIG_FILE
    if output_dir.exists() and not output_dir.is_dir():
        refuse("--output_dir", str(output_dir), "is a file; give a folder")
    if not _row_files(output_dir):
        return
    if not config.exists():
        refuse("--output_dir", str(output_dir), f"holds generations but no {CONFIG_FILE}; give another folder")
    there = _read_config(config)
    differing = [name for name in {**there, **identity} if there.get(name) != identity.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {there.get(name)!r} and is {identity.get(name)!r}" for name in differing)
        remedy = "give another folder, or the same settings to continue"
        refuse("--output_dir", str(output_dir), f"holds generations drawn otherwise ({changes}); {remedy}")


def claim(output_dir: Path, identity: Mapping[str, Any]) -> None:
    """Make `output_dir` if need be and note in it what its texts are drawn with. Raises like `refuse_other_run`."""
    refuse_other_run(output_dir, identity)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not _row_files(output_dir):  # nor does the configuration of a run count that drew nothing
        with atomic_write(output_dir / CONFIG_FILE) as file:
            file.write(json.dumps(dict(identity), indent=2, ensure_ascii=False) + "\n")


def append_rows(output_dir: Path, rank: int, rows: Iterable[Row]) -> None:
    """Add finished rows to the file of `rank`; they are on disk when this returns."""
    for row in rows:
        append_line(output_dir / f"generations.rank{rank}.jsonl", json.dumps(row, ensure_ascii=False))


def read_rows(output_dir: Path) -> dict[int, Row]:
    """All rows that earlier runs finished, by index, whatever their number of ranks. Torn lines are left out."""
    rows: dict[int, Row] = {}
    for path in _row_files(output_dir):
        # Not splitlines(): a text may hold characters such as U+2028 that it would also split at.
        for line in path.read_bytes().split(b"\n"):
            row = _row_or_none(line)
            if row is not None:
                rows[row["index"]] = row
    return rows


def merge(output_dir: Path, count: int) -> None:
    """Write rows 0 to `count` - 1 to `generations.jsonl` in order, then remove the files of the ranks."""
    rows = read_rows(output_dir)
    missing = [index for index in range(count) if index not in rows]
    if missing:
        raise RuntimeError(f"{len(missing)} generations are missing, the first is {missing[0]}")
    with atomic_write(output_dir / FINAL_FILE) as file:
        file.writelines(json.dumps(rows[index], ensure_ascii=False) + "\n" for index in range(count))
    for path in output_dir.glob(_RANK_FILES):
        path.unlink()


def digest(*paths: Path) -> str:
    """SHA-256 of the content of files, in the order given."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _row_files(output_dir: Path) -> list[Path]:
    """The merged file first, then those of the ranks."""
    final = output_dir / FINAL_FILE
    return ([final] if final.exists() else []) + sorted(output_dir.glob(_RANK_FILES))


def _row_or_none(line: bytes) -> Row | None:
    """The row of a whole line; None for what a crash tore off (no beginning of a JSON object is a JSON value)."""
    try:
        row: Row = json.loads(line)
    except ValueError:  # not JSON, or cut inside a character
        return None
    return row


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        refuse("--output_dir", str(path.parent), f"its {CONFIG_FILE} is not a JSON object; give another folder")
    return config
