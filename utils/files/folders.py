"""Folders that leave nothing, and the settings that a training recorded beside its results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dptune._validate import refuse
from dptune.published import SETTINGS_NAME, published_part

RUN_CONFIG_NAME = "run_config.json"  # the settings of a training run, in its folder


def missing_folders(path: Path) -> list[Path]:
    """`path` and the folders above it that are missing, the deepest first."""
    return [one for one in (path, *path.parents) if not one.exists()]


def require_new_folder(path: str, flag: str = "--output_dir") -> None:
    """Refuse a folder for results that cannot be made, or that holds something."""
    folder = Path(path)
    if not folder.parent.is_dir():
        refuse(flag, path, "the folder that it lies in does not exist; make it first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(flag, path, "is there already; give another name, or remove it")


def require_makeable_folder(folder: Path, flag: str) -> None:
    """Refuse a folder for results that is no folder, or that cannot be made. One that is there may hold something."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not nearest.is_dir():
        refuse(flag, str(folder), f"{nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK):
        refuse(flag, str(folder), f"{nearest} cannot be written to; give another folder")


def require_new_file(path: str | None, flag: str, suffix: str) -> None:
    """Refuse a file for results that cannot be written; None is for no file.

    Args:
        path: the file; one that is there is replaced.
        flag: that names it.
        suffix: with which its name must end, such as .png.
    """
    if path is None:
        return
    if not path.endswith(suffix):
        refuse(flag, path, f"give a name that ends in {suffix}")
    if not Path(path).parent.is_dir():
        refuse(flag, path, "its folder does not exist; make it first")
    if Path(path).is_dir():
        refuse(flag, path, "is a folder; give a file")
    if not os.access(Path(path).parent, os.W_OK):
        refuse(flag, path, "its folder cannot be written to; give another one")


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove these folders in order. One that holds something stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def recorded_by_training(trained: str | Path, name: str) -> Iterator[object]:
    """The values of a setting in the files of settings beside what a training left; none if there is no such file.

    Args:
        trained: a run's folder or its part that is published, an adapter's file or folder, a checkpoint, or the folder
            of a whole model.
        name: the setting.
    """
    path = Path(trained)
    folder = path if path.is_dir() else path.parent
    places = (published_part(folder) / SETTINGS_NAME, folder / RUN_CONFIG_NAME, folder.parent / RUN_CONFIG_NAME)
    for file in places:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and name in content:
            yield content[name]
