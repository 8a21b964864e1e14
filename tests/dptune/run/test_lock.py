"""One process at a time per folder: refused while another holds it, free once that process ends in any way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from dptune.run.lock import LOCK_NAME, FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from dptune.run.lock import FolderLock
with FolderLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_taker_is_refused_until_the_first_leaves(tmp_path: Path) -> None:
    with FolderLock() as first, FolderLock() as second:
        first.take(tmp_path)
        first.take(tmp_path)  # the process already holds it
        with pytest.raises(InvalidArgument, match="another process is at work in it"):
            second.take(tmp_path)
    with FolderLock() as third:
        third.take(tmp_path)


def test_it_is_given_up_after_an_error_too(tmp_path: Path) -> None:
    def fail() -> None:
        with FolderLock() as lock:
            lock.take(tmp_path)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    with FolderLock() as second:
        second.take(tmp_path)


def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InvalidArgument), FolderLock() as lock:
            lock.take(tmp_path)
        holder.kill()
    with FolderLock() as lock:
        lock.take(tmp_path)
    assert (tmp_path / LOCK_NAME).exists()


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with FolderLock() as lock:
        lock.take(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_ranks_beside_the_main_process_take_nothing(tmp_path: Path) -> None:
    with FolderLock(enabled=False) as lock:
        lock.take(tmp_path)
    assert list(tmp_path.iterdir()) == []
