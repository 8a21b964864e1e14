"""Folders that are written completely or not at all, or that leave nothing."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
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


def recorded_by_training(trained: str | Path, name: str) -> Iterator[object]:
    """The values of a setting in the files of settings beside what a training left; none if there is no such file.

    Args:
        trained: an adapter's file or folder, a checkpoint, or the folder of a whole model.
        name: the setting.
    """
    path = Path(trained)
    folder = path if path.is_dir() else path.parent
    for file in (folder / RUN_CONFIG_NAME, folder.parent / RUN_CONFIG_NAME):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and name in content:
            yield content[name]
