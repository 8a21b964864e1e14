"""Opens text files that may be compressed, and tells the kind of a file by its name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # {suffix: its name in pyarrow}


def kind_of_file(path: Path) -> str:
    """The suffix that decides how a file is read, in lower case, with that of its compression.

    >>> kind_of_file(Path("a/rows.v2.JSONL")), kind_of_file(Path("rows.jsonl.gz"))
    ('.jsonl', '.jsonl.gz')
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix in COMPRESSIONS else suffix


def open_text(path: Path) -> IO[str]:
    """Open a file for reading UTF-8, with line breaks as they are. A mark at its beginning is left out.

    Raises:
        OSError: it cannot be opened. A damaged compressed file raises it when it is read.
    """
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open(encoding="utf-8-sig", newline="")
    import pyarrow

    return io.TextIOWrapper(pyarrow.input_stream(str(path), compression=compression), "utf-8-sig", newline="")
