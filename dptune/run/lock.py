"""One run per folder at a time: two that append to one ledger and overwrite each other's checkpoints would ruin both.

It happens easily: a launcher that is killed leaves its workers running, and the next launch resumes in the same folder.
The lock belongs to the process and ends with it, however it ends.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dptune._validate import refuse
from dptune.adapter_files import WEIGHTS_NAME
from dptune.ledger import has_begun
from dptune.report.statement import REPORT_NAME
from dptune.run.checkpoint import LEDGER_NAME

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

    def take(self, folder: Path) -> None:
        """Take the folder if it exists and is not taken yet. Raises `InvalidArgument` if another process has it."""
        if not self._enabled or self._file is not None or not folder.is_dir():
            return
        file = (folder / LOCK_NAME).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            refuse("folder", str(folder), "another process is at work in it; wait for it, or end it")
        self._file = file

    def make(self, folder: Path) -> None:
        """Make the folder where it is missing, and take it before anything is written to it. A file is refused."""
        if folder.exists() and not folder.is_dir():
            refuse("folder", str(folder), "is a file; give a folder")
        if self._enabled:
            folder.mkdir(parents=True, exist_ok=True)
        self.take(folder)


def refuse_existing_run(folder: Path, also: Iterable[str] = ()) -> None:
    """Refuse a folder that holds a run: its ledger and what was trained belong together.

    Args:
        folder: may be missing.
        also: names of files and folders that a run of the caller leaves beside the engine's.
    """
    there = [LEDGER_NAME] if has_begun(folder / LEDGER_NAME) else []
    there += [name for name in (REPORT_NAME, WEIGHTS_NAME, *also) if (folder / name).exists()]
    if there:
        refuse("folder", str(folder), f"holds a run already ({there[0]}); give another folder or move it away")
