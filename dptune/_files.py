"""Files that are whole or not there: what a crash may interrupt is written aside and renamed, or appended and synced.

A reader never sees half a report or half a checkpoint, and a ledger line that was acknowledged survives a power cut.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the name `path` only when the block ends without an error.

    Until then `path` is absent or holds what it held before. The data are on disk before the name changes, because a
    rename that reaches the disk first would leave an empty file after a power cut.

    Args:
        path: where the file shall be; its folder must exist.
        mode: "w" for UTF-8 text with Unix line ends, "wb" for bytes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _create(temporary, mode) as file:
            yield file
            _sync(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append `line` and a line end to `path`, and return once both are on disk.

    What a crash tore off in the middle of a line gets a line end first, so the torn piece stays a line of its own that
    a reader can recognise instead of swallowing the beginning of the new one.

    Args:
        path: the file, made if absent; its folder must exist.
        line: UTF-8 text without a line end.
    """
    if "\n" in line:
        raise RuntimeError(f"append_line takes one line, not {line[:80]!r}")
    path = Path(path)
    created = not path.exists()
    with path.open("ab+") as file:
        file.write(_missing_line_end(file) + line.encode() + b"\n")
        _sync(file)
    if created:
        sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Hand all files below `folder`, and their names, to the disk: before a rename makes them count."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _create(path: Path, mode: Literal["w", "wb"]) -> IO[Any]:
    """Open a file that must be new. `open` obeys the umask, where `tempfile` lets the owner alone read."""
    if mode == "wb":
        return path.open("xb")
    return path.open("x", encoding="utf-8", newline="\n")


def _missing_line_end(file: IO[bytes]) -> bytes:
    """The line end that the last line of `file` lacks, or nothing."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _sync(file: IO[Any]) -> None:
    """Hand the file's content to the disk itself, past the buffers of Python and of the system."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Hand a new name to the disk. Only POSIX systems open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
