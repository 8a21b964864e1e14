"""Files that keep generated texts during a run: an interrupted run resumes, and no text is lost or repeated.

Each rank appends to its own file, `generations.rank<r>.jsonl`. The main process merges these into `generations.jsonl`
once every text is done. `generation_config.json` records the model and settings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict, cast

from utils.files.journal import Journal
from utils.files.jsonl import write_jsonl

FINAL_FILE = "generations.jsonl"
_RANK_FILES = "generations.rank*.jsonl"


class Generation(TypedDict):
    """One generated text. `ended`: it ended with an end token or stop string, not at the length limit."""

    prompt: str
    text: str
    index: int
    ended: bool


def generation_journal(output_dir: Path) -> Journal:
    """The journal of a folder: it checks that a run belongs in the folder, and stores its texts."""
    return Journal(output_dir, "generation_config.json", (FINAL_FILE, _RANK_FILES), "generations")


def append_generations(output_dir: Path, rank: int, rows: Iterable[Generation]) -> None:
    """Append finished rows to the file of `rank`; they are on disk when this returns."""
    journal = generation_journal(output_dir)
    for row in rows:
        journal.append(_RANK_FILES.replace("*", str(rank)), row)


def read_generations(output_dir: Path) -> dict[int, Generation]:
    """All finished rows by index, from any number of ranks."""
    return {row["index"]: cast("Generation", row) for row in generation_journal(output_dir).rows()}


def merge_generations(output_dir: Path, count: int) -> None:
    """Write rows 0 to `count` - 1 to `generations.jsonl` in order, then delete the ranks' files.

    Raises:
        RuntimeError: a row is missing. The ranks' files are kept.
    """
    rows = read_generations(output_dir)
    missing = [index for index in range(count) if index not in rows]
    if missing:
        raise RuntimeError(f"{len(missing)} generations are missing, the first is {missing[0]}")
    write_jsonl(output_dir / FINAL_FILE, (rows[index] for index in range(count)))
    for path in output_dir.glob(_RANK_FILES):
        path.unlink()


def digest_of_files(*paths: Path) -> str:
    """SHA-256 of the content of files, in the order given."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
