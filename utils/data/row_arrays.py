"""Tokenised examples in files of a folder: written as they come, then mapped read-only by every process.

Each data set is three arrays without headers, `NAME.ids`, `NAME.is_answer` and `NAME.starts` (see `TokenizedDataset`),
and `NAME.authors` if authors are the privacy unit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from dptune._validate import refuse
from dptune.units.unit import Authors
from utils.data.encoding import Encoded
from utils.data.tokenization import TokenizedDataset

_TYPES = {"ids": np.int32, "is_answer": np.bool_, "starts": np.int64, "authors": np.int64}
KINDS = (*_TYPES, "names")  # suffixes of files
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """What is known about a data set besides its arrays, as JSON values.

    Attributes:
        examples, tokens: how many.
        num_cut: number of examples that were cut to the block size.
        largest, num_left_out: see `Authors`; None without authors.
        prompt_style: the style that sampling must use.
        rows_of_files: number of rows of each file, before any are left out.
    """

    examples: int
    tokens: int
    num_cut: int
    largest: int | None = None
    num_left_out: int | None = None
    prompt_style: str | None = None
    rows_of_files: list[int] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each array."""
        authors = {} if self.largest is None else {"authors": self.examples}
        return {"ids": self.tokens, "is_answer": self.tokens, "starts": self.examples + 1, **authors}


class ArrayWriter:
    """Writes the arrays of one data set in a `with` block, which closes the files.

    Args:
        folder: an existing folder, in which no data set of this name is.
        name: the data set's.
        prompt_style: the style that sampling must use.
    """

    def __init__(self, folder: Path, name: str, prompt_style: str | None = None) -> None:
        self._folder, self._name, self._prompt_style = folder, name, prompt_style
        self._files: dict[str, IO[bytes]] = {}
        self.examples = self.tokens = self.num_cut = 0

    def __enter__(self) -> ArrayWriter:
        for kind in ("ids", "is_answer", "starts"):
            self._files[kind] = create(self._folder / f"{self._name}.{kind}")
        self._write("starts", np.zeros(1, dtype=np.int64))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(self, encoded: Encoded) -> None:
        """Append some examples."""
        self._write("ids", encoded.ids)
        self._write("is_answer", encoded.is_answer)
        self._write("starts", self.tokens + np.cumsum(encoded.sizes, dtype=np.int64))
        self.examples += len(encoded.sizes)
        self.tokens += len(encoded.ids)
        self.num_cut += encoded.num_cut

    def stored(self, authors: Authors | None = None, rows_of_files: Sequence[int] = ()) -> Stored:
        """What was written, after the authors are written too. `rows_of_files`: see `Stored`."""
        more: dict[str, Any] = {"prompt_style": self._prompt_style, "rows_of_files": list(rows_of_files)}
        if authors is None:
            return Stored(self.examples, self.tokens, self.num_cut, **more)
        if len(authors.of_row) != self.examples:
            raise RuntimeError(f"{self.examples} examples have {len(authors.of_row)} authors")
        self._files["authors"] = create(self._folder / f"{self._name}.authors")
        for start in range(0, self.examples, _BLOCK):
            self._write("authors", authors.of_row[start : start + _BLOCK])
        counts = (self.examples, self.tokens, self.num_cut, authors.largest, authors.num_left_out)
        return Stored(*counts, **more)

    def _write(self, kind: str, values: np.ndarray) -> None:
        self._files[kind].write(np.ascontiguousarray(values, dtype=_TYPES[kind]).data)


class NameFile:
    """The authors' names of rows, one a line, empty for a row without one. Iterate over it as often as needed.

    Args:
        path: a new file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._file = create(path)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: object) -> bool:
        return any(name == one for one in self)

    def __iter__(self) -> Iterator[str | None]:
        with self._path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield line.removesuffix("\n") or None

    def add_all(self, names: Sequence[str | None]) -> None:
        """Append the names of the next rows. They have no line ends (`dptune.units.names.author_name`)."""
        self._file.write("".join(f"{name or ''}\n" for name in names).encode())
        self._count += len(names)

    def close(self) -> None:
        """End writing. Call it before reading."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file."""
        self.close()
        self._path.unlink()


def open_arrays(folder: Path, name: str, stored: Stored, flag: str) -> TokenizedDataset:
    """A data set whose arrays are mapped read-only. They stay valid when the files are deleted.

    Raises:
        InvalidArgument: a file is missing or has another size; names `flag`.
    """
    found: dict[str, Any] = {}
    for kind, size in stored.sizes.items():
        path, item = folder / f"{name}.{kind}", np.dtype(_TYPES[kind]).itemsize
        if not path.is_file() or path.stat().st_size != size * item:
            refuse(flag, str(folder), f"{path.name} is missing or damaged; remove the folder, or give another one")
        found[kind] = np.memmap(path, dtype=_TYPES[kind], mode="r", shape=(size,))
    authors = found.pop("authors", None)
    who = None if authors is None else Authors(authors, stored.largest or 0, stored.num_left_out or 0)
    return TokenizedDataset(**found, num_cut=stored.num_cut, authors=who, prompt_style=stored.prompt_style)


def create(path: Path) -> IO[bytes]:
    """A new file that only its owner can read, whatever the umask."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
