"""From rows to tokens, a chunk of rows at a time: what worker processes do. No torch here, so that they start fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from utils.data.encoding import Encoded, Encoder
from utils.data.record import Record, RecordMaker
from utils.data.template_date import told_date
from utils.files.cells import Place
from utils.files.tables import Row

_ROWS_AT_ONCE = 1000


class MakeRecord(Protocol):
    """Makes the record of each row of a data set."""

    @property
    def prompt_style(self) -> str:
        """The style that sampling must use."""

    def __call__(self, row: Row, place: Place, /) -> Record: ...


class Chunk(NamedTuple):
    """Some neighbouring rows.

    Attributes:
        rows: with their places.
        keep: which of them become examples, bool; None for all.
        first: the number of the first example, from 0.
    """

    rows: list[tuple[Place, Row]]
    keep: np.ndarray | None
    first: int


@dataclass(frozen=True)
class EncodeRows:
    """Rows -> tokens and authors' names. It is sent to the worker processes.

    Attributes:
        make: makes the record of a row.
        encoder: tokenises records.
        day: what chat templates take for today.
    """

    make: MakeRecord
    encoder: Encoder
    day: str | None

    def __call__(self, chunk: Chunk) -> tuple[Encoded, list[str | None]]:
        with told_date(self.day):
            records = [self.make(row, place) for place, row in chunk.rows]
        if chunk.keep is not None:
            records = [record for record, kept in zip(records, chunk.keep, strict=True) if kept]
        return self.encoder.encoded(records, chunk.first), [record.author for record in records]


@dataclass(frozen=True)
class AbstractRecords:
    """Makes the record of an abstract: a fixed prompt in a prompt style, and the abstract as the answer."""

    prompt: str
    maker: RecordMaker
    prompt_style: str

    def __call__(self, row: Row, place: Place) -> Record:  # noqa: ARG002  # all makers of records have one signature
        return self.maker.answered(self.prompt, str(row["abstract"]))


def chunked(rows: Iterator[tuple[Place, Row]], keep: np.ndarray | None) -> Iterator[Chunk]:
    """The rows in chunks. `keep` says of each row whether it becomes an example."""
    read = examples = 0
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        kept = None if keep is None else keep[read : read + len(chunk)]
        read += len(chunk)
        if keep is not None and read > len(keep):
            _refuse_change(chunk[-1][0])
        yield Chunk(chunk, kept, examples)
        examples += len(chunk) if kept is None else int(kept.sum())
        last = chunk[-1][0]
    if keep is not None and read < len(keep):
        _refuse_change(last)


def _refuse_change(place: Place) -> NoReturn:
    place.refuse("other rows than a moment ago; let no other program write the file meanwhile")
