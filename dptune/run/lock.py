"""One run per folder at a time. Two runs would append to the same ledger and overwrite each other's checkpoints.

This happens easily: a killed launcher leaves its workers running, and the next launch resumes in the same folder. The
operating system releases the lock when the process ends, even after a crash.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import TracebackType
from typing import IO

from dptune._validate import refuse

LOCK_NAME = ".lock"


class FolderLock:
    """Locks a run's folder from `take` or `make` to the end of the `with` block.

    Args:
        enabled: whether this process locks at all; only the main process should.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._file: IO[bytes] | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Unlock the folder; does nothing if it is not locked."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, run_folder: Path) -> None:
        """Lock the folder if it exists. Raises `InvalidArgument` if another process holds it."""
        if not self._enabled or self._file is not None or not run_folder.is_dir():
            return
        file = (run_folder / LOCK_NAME).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            refuse("run_folder", str(run_folder), "another process is at work in it; wait until it ends, or end it")
        self._file = file

    def make(self, run_folder: Path) -> None:
        """Make the folder if it is missing, and lock it before anything is written to it.

        Raises:
            InvalidArgument: `run_folder` is a file, or another process holds it.
        """
        if run_folder.exists() and not run_folder.is_dir():
            refuse("run_folder", str(run_folder), "is a file; give a folder")
        if self._enabled:
            run_folder.mkdir(parents=True, exist_ok=True)
        self.take(run_folder)
