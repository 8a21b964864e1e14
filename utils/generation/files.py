"""Where generated texts are kept while they are drawn: an interrupted run resumes, no text is lost or doubled.

Each rank appends to a file of its own, `generations.rank<r>.jsonl`. The main process merges them into
`generations.jsonl` once every text is there. `generation_config.json` says what drew them.
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
    """One generated text. `ended`: the model closed it itself, it was not cut at the length limit."""

    prompt: str
    text: str
    index: int
    ended: bool


def generation_journal(output_dir: Path) -> Journal:
    """What says whether a folder may take the texts of a run, and takes them."""
    return Journal(output_dir, "generation_config.json", (FINAL_FILE, _RANK_FILES), "generations")


def append_generations(output_dir: Path, rank: int, rows: Iterable[Generation]) -> None:
    """Add finished rows to the file of `rank`; they are on disk when this returns."""
    journal = generation_journal(output_dir)
    for row in rows:
        journal.append(_RANK_FILES.replace("*", str(rank)), row)


def read_generations(output_dir: Path) -> dict[int, Generation]:
    """All rows that earlier runs finished, by index, whatever their number of ranks."""
    return {row["index"]: cast("Generation", row) for row in generation_journal(output_dir).rows()}


def merge_generations(output_dir: Path, count: int) -> None:
    """Write rows 0 to `count` - 1 to `generations.jsonl` in order, then remove the files of the ranks.

    Raises:
        RuntimeError: a row is missing. The files of the ranks stay.
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
