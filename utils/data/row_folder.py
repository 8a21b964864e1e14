"""The folder in which one process of a machine makes the tokenised rows, and from which all map them.

A run's own folder is `.rows-N` in the output folder, or a temporary one for a dry run. It is removed as soon as all
processes have mapped the files; the system frees the disk when the last of them ends, however it ends. `--data_cache`
names a folder that stays: its rows are used again for the same data and settings, and refused for others.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from dptune._files import atomic_write, sync_tree
from dptune._validate import refuse
from utils.data.row_arrays import KINDS, Stored
from utils.files.folders import missing_folders, remove_empty

FLAG = "--data_cache"
_PREFIX, _LOCK, _WHAT = ".rows-", ".rows.lock", "rows.json"
_PRIVATE = 0o700
TRAIN, HELD_OUT = "train", "validation"  # names of data sets
_OWN_FILES = re.compile(rf"({TRAIN}|{HELD_OUT})\.({'|'.join(KINDS)})|{re.escape(_LOCK)}|\.{re.escape(_WHAT)}\..*\.tmp")

Splits = Mapping[str, Stored]  # name of a data set -> what its arrays are
Make = Callable[[Path], Splits]  # fills an empty folder


class RowFolder:
    """The folder of tokenised rows of one run on one machine, as the process that makes them sees it.

    Args:
        key: what the rows follow from, {flag or other name: JSON value}.
        cache: --data_cache.
        run_folder: the run's folder; it may be missing. None for a dry run, which writes nothing that stays.
        number: tells the machines of a run apart that share a disk.
    """

    def __init__(
        self, key: Mapping[str, object], *, cache: str | None = None, run_folder: Path | None = None, number: int = 0
    ) -> None:
        self._key: dict[str, object] = json.loads(json.dumps(key))
        self._cache = None if cache is None else Path(cache)
        self._run_folder, self._number = run_folder, number
        self._made: list[Path] = []  # folders to remove if they are empty, the deepest first
        self._own: Path | None = None  # the folder to remove

    def prepare(self, make: Make) -> tuple[Path, Splits]:
        """(the folder with the rows, what is in it): made by `make`, or found in --data_cache.

        Raises:
            InvalidArgument: --data_cache holds other rows or other files; or what `make` refuses.
        """
        if self._cache is None:
            return self._make_own(make)
        if (found := self._found()) is not None:
            if not self._number:
                print(f"tokenised rows         from {self._cache}, made by an earlier run")
            return self._cache, found
        if self._run_folder is None:
            return self._make_own(make)
        if self._cache.exists() and not self._cache.is_dir():
            refuse(FLAG, str(self._cache), "is a file; give a folder")
        self._cache.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        with _locked(self._cache):
            return self._cache, self._found() or self._fill(self._cache, make)

    def discard(self) -> None:
        """Remove the folder unless it is --data_cache. Mapped files stay readable."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
        remove_empty(self._made)

    def _make_own(self, make: Make) -> tuple[Path, Splits]:
        if self._run_folder is None:
            self._own = Path(tempfile.mkdtemp(prefix="dptune-rows-"))  # only its owner can read it
        else:
            self._own = self._run_folder / f"{_PREFIX}{self._number}"
            self._made = missing_folders(self._run_folder)
            self._run_folder.mkdir(parents=True, exist_ok=True)
            self._own.mkdir(mode=_PRIVATE)
        try:
            return self._own, make(self._own)
        except BaseException:
            self.discard()
            raise

    def _fill(self, cache: Path, make: Make) -> Splits:
        """Make rows that stay, all or none. A crash leaves files without `rows.json`; they are replaced."""
        other = sorted(path.name for path in cache.iterdir() if not _OWN_FILES.fullmatch(path.name))
        if other:
            refuse(FLAG, str(cache), f"holds other files ({other[0]}); give a new or an empty folder")
        _clear(cache)
        try:
            splits = make(cache)
            sync_tree(cache)
            with atomic_write(cache / _WHAT) as file:
                rows = {name: asdict(stored) for name, stored in splits.items()}
                file.write(json.dumps({"made_from": self._key, "rows": rows}, indent=2) + "\n")
        except BaseException:
            _clear(cache)
            raise
        return splits

    def _found(self) -> Splits | None:
        """The rows that --data_cache holds; None if it holds none.

        Raises:
            InvalidArgument: they were made from something else.
        """
        if self._cache is None or not (self._cache / _WHAT).is_file():
            return None
        try:
            content = json.loads((self._cache / _WHAT).read_text(encoding="utf-8"))
            made_from = dict(content["made_from"])
            splits = {name: Stored(**stored) for name, stored in content["rows"].items()}
        except (ValueError, TypeError, LookupError, AttributeError):
            refuse(FLAG, str(self._cache), f"{_WHAT} is damaged; remove the folder, or give another one")
        other = [name for name in {**self._key, **made_from} if self._key.get(name) != made_from.get(name)]
        if other:
            told = f"holds rows that were made with another {', '.join(other)}"
            refuse(FLAG, str(self._cache), f"{told}; give another folder, or remove this one")
        return splits


def clear_leftovers(run_folder: Path | None) -> None:
    """Remove what a crashed run left in a run's folder. No other run may be at work there."""
    for left in () if run_folder is None else run_folder.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _clear(cache: Path) -> None:
    """Remove all files of a folder that holds no others."""
    for path in cache.iterdir():
        if path.name != _LOCK:
            path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process makes rows in the folder, then keep others waiting."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
