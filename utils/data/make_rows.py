"""Makes the arrays of tokenised rows: rows stream from their sources through worker processes into files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from dptune._validate import refuse
from dptune.units.unit import Authors, PrivacyUnit, authors_of_names, choose_of_authors
from utils.data.encode_rows import AbstractRecords, EncodeRows, MakeRecord, chunked
from utils.data.encoding import Encoded, Encoder
from utils.data.forms import AS_USUAL, COLUMN_FLAGS, NamedColumns
from utils.data.prompts import PUBMED_PROMPT, ChatTemplateError, format_prompt
from utils.data.record import RecordMaker
from utils.data.records import RowRecords
from utils.data.row_arrays import ArrayWriter, NameFile, Stored
from utils.data.row_folder import HELD_OUT, TRAIN, Splits
from utils.data.sources import AbstractRows, RowSource, numbered
from utils.data.template_date import TEMPLATE_DATE, told_date
from utils.data.workers import in_order, num_processors
from utils.files.cells import Place, author_of
from utils.files.tables import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2  # of the arrays; another number where a new version of this project makes others of the same rows
_MOST_WORKERS = 16  # more of them would wait for the process that reads
_QUIET = 2.0  # seconds of work after which progress is shown

Sources = dict[str, RowSource]  # name of a data set -> its rows


@dataclass(frozen=True)
class RowSettings:
    """How rows become examples: the arguments of `load_training_data` of the same names."""

    prompt_style: str
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    unit: PrivacyUnit
    seed: int
    users_flag: str | None
    day: str | None
    named: NamedColumns = AS_USUAL

    def key(self, sources: Sources) -> dict[str, object]:
        """What the examples follow from, by the names of the flags."""
        import tokenizers
        import transformers

        unit, bounded = self.unit, self.unit.bounds_authors
        special = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        told = [self.tokenizer.backend_tokenizer.to_str(), special, str(self.tokenizer.chat_template)]
        states = {HELD_OUT: None, **{name: [one.flag, one.state()] for name, one in sources.items()}}
        return {
            "training data": states[TRAIN],
            "validation data": states[HELD_OUT],
            "tokenizer": hashlib.sha256("\n".join(told).encode()).hexdigest(),
            "--block_size": self.block_size,
            "--prompt_style": self.prompt_style,
            **{flag: self.named.given.get(flag) for flag in COLUMN_FLAGS},
            "--privacy_unit": unit.column,
            "--examples_per_unit": unit.examples if bounded else None,
            "--seed": self.seed if bounded else None,
            "--ignore_users": self.users_flag is None,
            TEMPLATE_DATE: self.day,
            "version": [_FORMAT, tokenizers.__version__, transformers.__version__],
        }

    def write(self, sources: Sources, encoder: Encoder, folder: Path) -> Splits:
        """Write the arrays of every source that has rows.

        Args:
            sources: where the rows come from.
            encoder: tokenises them.
            folder: an empty folder.

        Raises:
            InvalidArgument: a reader refuses a file, or a row is no example. Names the flag, the file and the row.
        """
        made = {name: self._write_one(name, source, encoder, folder) for name, source in sources.items()}
        return {name: stored for name, stored in made.items() if stored.examples}

    def _write_one(self, name: str, source: RowSource, encoder: Encoder, folder: Path) -> Stored:
        """Write the arrays of one source."""
        column = self.unit.column if name == TRAIN else None
        keep, authors = None, None
        if column is not None and self.unit.bounds_authors:
            keep, authors = self._chosen(source, column, folder)
        names = NameFile(folder / f"{name}.names") if column is not None and keep is None else None
        rows_of_files: list[int] = []
        rows = _counted(numbered(source, column), rows_of_files)
        make, found = self.encoded(rows, source, encoder, name=name, keep=keep)
        with ArrayWriter(folder, name, None if make is None else make.prompt_style) as writer:
            for encoded, authors_of_rows in found:
                writer.add(encoded)
                if names is not None:
                    names.add_all(authors_of_rows)
            if names is not None:
                names.close()
                authors = authors_of_names(names)
                names.remove()
            return writer.stored(authors, rows_of_files)

    def _chosen(self, source: RowSource, column: str, folder: Path) -> tuple[np.ndarray, Authors]:
        """(which rows stay, bool [rows]; who wrote those), from a first reading of the authors alone."""
        names = NameFile(folder / f"{TRAIN}.names")
        for place, row in _shown(numbered(source, column), "authors"):
            names.add_all([author_of(row, column, place)])
        names.close()
        chosen = choose_of_authors(names, self.unit.examples, self.seed)
        names.remove()
        return chosen

    def encoded(
        self,
        rows: Iterator[tuple[Place, Row]],
        source: RowSource,
        encoder: Encoder,
        *,
        name: str = TRAIN,
        keep: np.ndarray | None = None,
    ) -> tuple[MakeRecord | None, Iterator[tuple[Encoded, list[str | None]]]]:
        """(what makes the records, the tokens of all rows in order with their authors); no maker without rows.

        Args:
            rows: with their places.
            source: where they come from.
            encoder: tokenises them.
            name: of the data set. Only training rows have authors.
            keep: which of them become examples, bool; None for all.

        Raises:
            InvalidArgument: a row is no example. Names the flag, the file and the row.
        """
        first = next(rows, None)
        if first is None:
            return None, iter(())
        make = self._maker(source, *first, training=name == TRAIN)
        chunks = chunked(_shown(chain([first], rows), f"{name} rows"), keep)
        return make, in_order(chunks, EncodeRows(make, encoder, self.day), min(num_processors(), _MOST_WORKERS))

    def _maker(self, source: RowSource, place: Place, first: Row, *, training: bool) -> MakeRecord:
        """What makes the records of a source, decided by its first row."""
        with told_date(self.day):
            return self._make(source, place, first, training=training)

    def _make(self, source: RowSource, place: Place, first: Row, *, training: bool) -> MakeRecord:
        if not isinstance(source, AbstractRows):
            return RowRecords(
                first,
                place,
                prompt_style=self.prompt_style,
                tokenizer=self.tokenizer,
                author_column=self.unit.column if training else None,
                users_flag=self.users_flag if training else None,
                named=self.named,
            )
        try:
            prompt = format_prompt(PUBMED_PROMPT, self.prompt_style, self.tokenizer)
        except ChatTemplateError as error:
            refuse("--prompt_style", self.prompt_style, f"{error}; give plain")
        return AbstractRecords(prompt, RecordMaker(self.tokenizer), self.prompt_style)


def _counted(rows: Iterator[tuple[Place, Row]], counts: list[int]) -> Iterator[tuple[Place, Row]]:
    """The same rows. Appends the number of rows of each file to `counts`."""
    for place, row in rows:
        if place.row == 1:
            counts.append(0)
        counts[-1] += 1
        yield place, row


def _shown(rows: Iterator[tuple[Place, Row]], what: str) -> Iterator[tuple[Place, Row]]:
    """The same rows. Shows how many were read, if it takes long."""
    return iter(tqdm(rows, desc=f"reading {what}", unit=" rows", unit_scale=True, delay=_QUIET, mininterval=1.0))
