"""One run per folder at a time: two that append to one ledger and overwrite each other's checkpoints would ruin both.

It happens easily: a launcher that is killed leaves its workers running, and the next launch resumes in the same folder.
The lock belongs to the process and ends with it, however it ends.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dptune._validate import refuse

LOCK_NAME = ".lock"


class FolderLock:
    """Holds a run's folder from `take` to the end of its `with` block.

    Args:
        enabled: whether this process takes part; the main process alone does.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._file: IO[Any] | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder back; does nothing the second time."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, run_folder: Path) -> None:
        """Take the folder if it exists and is not taken yet. Raises `InvalidArgument` if another process has it."""
        if not self._enabled or self._file is not None or not run_folder.is_dir():
            return
        file = (run_folder / LOCK_NAME).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            refuse("run_folder", str(run_folder), "another process is at work in it; wait for it, or end it")
        self._file = file

    def make(self, run_folder: Path) -> None:
        """Make the folder where it is missing, and take it before anything is written to it. A file is refused."""
        if run_folder.exists() and not run_folder.is_dir():
            refuse("run_folder", str(run_folder), "is a file; give a folder")
        if self._enabled:
            run_folder.mkdir(parents=True, exist_ok=True)
        self.take(run_folder)
