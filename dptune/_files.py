"""Crash-safe files: a file is written under another name and renamed, or a line is appended and synced.

A reader never sees half a report or half a checkpoint. A ledger line survives a power cut once `append_line` returns.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that gets the name `path` only when the block ends without an error.

    Until then `path` is absent or keeps its old content. The data reach the disk before the new name does. Otherwise a
    power cut could leave an empty file.

    Args:
        path: the file to write; its folder must exist.
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

    If a crash cut the last line short, it gets a line end first. So the torn piece stays a separate line that a reader
    can recognise.

    Args:
        path: the file, made if absent; its folder must exist.
        line: text without a line end, written as UTF-8.
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


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `target` and fill it with `write`, completely or not at all. An existing one is replaced.

    Its files may be read by whom the umask allows. Some libraries write files that only the owner can read.
    """
    partial, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.{end}") for end in ("tmp", "old"))
    try:
        partial.mkdir()
        write(partial)
        _allow_readers(partial)
        sync_tree(partial)
        if target.exists():
            target.rename(old)  # at once, where removing it takes long
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _allow_readers(folder: Path) -> None:
    """Let those read the files below `folder` who may read a new file here."""
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    probe.touch(exist_ok=False)
    readers = probe.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | readers)


def sync_tree(folder: Path) -> None:
    """Flush all files below `folder`, and their names, to disk. Call it before a rename makes them valid."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _create(path: Path, mode: Literal["w", "wb"]) -> IO[bytes] | IO[str]:
    """Open a file that must be new. `open` obeys the umask; `tempfile` would let only the owner read."""
    if mode == "wb":
        return path.open("xb")
    return path.open("x", encoding="utf-8", newline="\n")


def _missing_line_end(file: IO[bytes]) -> bytes:
    """A line end if the last line of `file` lacks one, otherwise nothing."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _sync(file: IO[bytes] | IO[str]) -> None:
    """Flush the file's content to disk, past the buffers of Python and of the operating system."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush new names in `folder` to disk. Only POSIX systems can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
