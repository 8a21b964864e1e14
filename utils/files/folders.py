"""Folders that are written completely or not at all, or that leave nothing."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dptune._files import sync_folder, sync_tree

RUN_CONFIG_NAME = "run_config.json"  # the settings of a training run, in its folder


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill the folder `target` with `write`, completely or not at all. Replaces an existing one, as left by a finished
    run that is resumed."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(partial)
        sync_tree(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(target.parent)


def missing_folders(path: Path) -> list[Path]:
    """`path` and the folders above it that are missing, the deepest first."""
    return [one for one in (path, *path.parents) if not one.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove these folders in order. One that holds something stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
