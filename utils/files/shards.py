"""Rows in many files: paths, globs and folders of files of one kind, read in order as if they were one file.

No row may be left out or read twice without notice: epsilon counts the rows. So a folder holds files of one kind and
nothing else that may be data, and no file is named twice.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from dptune._validate import refuse
from utils.files.compressed import kind_of_file
from utils.files.tables import KINDS, KINDS_IN_WORDS

_SAVED = ("dataset_dict.json", "state.json")  # files in a folder of `datasets.save_to_disk`
_GLOB = frozenset("*?[")
_NO_DATA = (".md",)  # suffixes of files that may lie beside the data

Paths = str | Path | Sequence[str | Path]


def find_files(given: Paths, flag: str) -> list[Path]:
    """The files, and saved DatasetDicts, that the values of a flag name: in their order, each one's sorted by path.

    Args:
        given: paths of files, of saved DatasetDicts or of folders of files; or globs, such as `data/*.parquet`.
        flag: the command-line flag; errors name it.

    Raises:
        InvalidArgument: nothing matches a glob, a file is named twice, or a folder holds no data or several kinds of
            files. Files are not opened.
    """
    found = [path for value in as_list(given) for path in _expanded(str(value), flag)]
    if not found:
        refuse(flag, None, "give at least one file")
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            refuse(flag, str(path), "is named twice, so its rows would count twice; name it once")
        seen.add(path.resolve())
    return found


def as_list(given: Paths | None) -> list[str | Path]:
    """The values of a flag."""
    if given is None:
        return []
    return [given] if isinstance(given, str | Path) else list(given)


def paths_in_words(given: Paths | None) -> str | None:
    """The values of a flag as they stand in a command line."""
    if given is None or isinstance(given, str | Path):
        return None if given is None else str(given)
    return " ".join(map(str, given))


def _expanded(value: str, flag: str) -> list[Path]:
    """The files of one value of the flag."""
    if _GLOB.intersection(value) and not Path(value).exists():
        matched = sorted(Path(name) for name in glob.glob(value, recursive=True))
        if not matched:
            refuse(flag, value, "no file matches; check the pattern")
        return [path for one in matched for path in _inside(one, flag)]
    return _inside(Path(value), flag)


def _inside(path: Path, flag: str) -> list[Path]:
    """The path itself, or the files of a folder that is no saved DatasetDict."""
    if not path.is_dir() or any((path / name).exists() for name in _SAVED):
        return [path]
    files = sorted(one for one in path.iterdir() if not one.name.startswith((".", "_")) and one.suffix not in _NO_DATA)
    kinds = {kind_of_file(one) for one in files}
    other = next((one for one in files if kind_of_file(one) not in KINDS or one.is_dir()), None)
    if other is not None:
        remedy = f"holds {other.name}, which is not {KINDS_IN_WORDS}; move it elsewhere, or give its path"
        refuse(flag, str(path), f"not a saved DatasetDict, and as a folder of files it {remedy}")
    if len(kinds) != 1:
        told = f"holds {' and '.join(sorted(kinds))} files" if kinds else "holds no files of rows"
        refuse(flag, str(path), f"{told}; give a folder of one kind: {KINDS_IN_WORDS}; or give paths")
    return files
