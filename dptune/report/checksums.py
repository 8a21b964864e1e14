"""Checksums of the files that a run publishes, in the format of `sha256sum`: `sha256sum -c SHA256SUMS` checks them too.

Two files are left out, because people complete them: the model card, which is held against the report instead, and
PEFT's configuration, where the base model's name may replace its path.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from dptune._validate import refuse

CHECKSUMS_NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: Path, *, but: Collection[str]) -> None:
    """Write the file for everything in `folder` except the names in `but` and itself."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names if name not in (*but, CHECKSUMS_NAME)]
    (folder / CHECKSUMS_NAME).write_text("".join(lines), encoding="utf-8")


def require_checksums(folder: Path) -> set[str]:
    """The names of the files that the checksums list.

    Raises:
        InvalidArgument: there are no checksums, or a listed file is missing or another one. Names the file.
    """
    file = folder / CHECKSUMS_NAME
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        refuse("file", str(file), "is missing or unreadable; restore it from the run's folder")
    names = set()
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None:
            refuse("file", str(file), f"has a line that is no checksum, {line[:40]!r}; restore it")
        digest, name = found.groups()
        if not (folder / name).is_file():
            refuse("file", name, f"is listed in {CHECKSUMS_NAME} but missing; restore it from the run's folder")
        if _digest(folder / name) != digest:
            refuse("file", name, f"is not the file that the run left ({CHECKSUMS_NAME}); restore it")
        names.add(name)
    return names


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
