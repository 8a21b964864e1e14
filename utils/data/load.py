"""Reads and tokenises the data of train_clm.py: a user's files, a data set of the hub or a built-in one.

Rows stream from their files through worker processes into arrays on disk, which every rank maps. So no process ever
holds all rows, and they are tokenised once for all ranks of a machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from dptune._validate import refuse
from dptune.units.unit import Authors, PrivacyUnit, authors_of_names, choose_of_authors
from utils.cli.machines import ALONE, Machine
from utils.data.encoding import Encoded, Encoder
from utils.data.named_sets import DATA_DIR, DATASET_NAMES, FIRST_DAY, LAST_DAY
from utils.data.prompts import PUBMED_PROMPT, ChatTemplateError, format_prompt
from utils.data.pubmed import DayRange, abstract_files
from utils.data.records import Record, RecordMaker, RowRecords
from utils.data.row_arrays import ArrayWriter, NameFile, Stored, open_arrays
from utils.data.row_folder import FLAG, HELD_OUT, TRAIN, RowFolder, Splits, clear_leftovers
from utils.data.sources import AbstractRows, FileRows, Source, numbered
from utils.data.template_date import TEMPLATE_DATE, told_date
from utils.data.tokenization import TokenizedDataset
from utils.data.workers import in_order, num_processors
from utils.files.cells import Place, author_of
from utils.files.shards import Paths, find_files, in_words
from utils.files.tables import Row, has_validation_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROW = PrivacyUnit()
_FORMAT = 1  # of the arrays; another number where a new version of this project makes others of the same rows
_ROWS_AT_ONCE = 1000
_MOST_WORKERS = 16  # more of them would wait for the process that reads
_QUIET = 2.0  # seconds of work after which progress is shown

MakeRecord = Callable[[Row, Place], Record]


def load_training_data(
    *,
    dataset_name: str | None,
    train_file: Paths | None,
    validation_file: Paths | None,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    data_dir: str | Path | None = None,
    date_from: str = FIRST_DAY,
    date_to: str = LAST_DAY,
    unit: PrivacyUnit = _ROW,
    seed: int = 0,
    users_flag: str | None = None,
    data_cache: str | None = None,
    run_folder: Path | None = None,
    day: str | None = None,
    machine: Machine = ALONE,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The training set and the validation set; None if there is no validation set. Every rank calls it.

    Args:
        dataset_name: one of DATASET_NAMES; exactly one of this and `train_file`.
        train_file: files, globs, folders of files or saved DatasetDicts (see `utils.files.shards.find_files`).
        validation_file: the same for validation. Without it, the validation split of a single DatasetDict or of the
            built-in data set is used.
        prompt_style: see `utils.data.prompts.format_prompt`.
        tokenizer: a fast tokenizer.
        block_size: maximum tokens per example.
        data_dir: holds a folder for each built-in data set (`pubmed`); None for the project's own `data`.
        date_from, date_to: ISO days, inclusive, for built-in data sets with dates.
        unit: the privacy unit. With a column, the training set records each row's author; if the unit bounds authors,
            at most `unit.examples` rows of each are kept.
        seed: chooses which rows of an author are kept.
        users_flag: see `utils.data.records.RowRecords`; not for the validation set.
        data_cache: a folder that keeps the tokenised rows for the next run.
        run_folder: where they are until all ranks have mapped them, without `data_cache`; None for a temporary folder.
        day: what chat templates take for today; None for the real day.
        machine: the ranks of this machine. One of them makes the rows.

    Raises:
        InvalidArgument: for a mistake in the flags or the data; names the flag, its value and the remedy.
    """
    if (dataset_name is None) == (train_file is None):
        refuse("--train_file", in_words(train_file), "give exactly one of --train_file and --dataset_name")
    data = _Data(prompt_style, tokenizer, block_size, unit, seed, users_flag, day)
    if dataset_name is not None:
        folder, days = Path(data_dir or DATA_DIR) / "pubmed", DayRange.parse(date_from, date_to)
        find = partial(_named_sources, dataset_name, folder, days, unit)
    else:
        find = partial(_file_sources, train_file or (), own_validation=validation_file is None)
    return data.loaded(
        lambda: _with_validation(find(), validation_file), data_cache=data_cache, run_folder=run_folder, machine=machine
    )


Sources = dict[str, Source]  # name of a data set -> its rows


def _with_validation(sources: Sources, validation_file: Paths | None) -> Sources:
    """The sources, with the files that were given for validation."""
    if validation_file is None:
        return sources
    flag = "--validation_file"
    return {TRAIN: sources[TRAIN], HELD_OUT: FileRows(find_files(validation_file, flag), flag, "validation")}


def _named_sources(name: str, folder: Path, days: DayRange, unit: PrivacyUnit) -> Sources:
    """The rows of a built-in data set."""
    if unit.column is not None:
        refuse("--privacy_unit", unit.column, f"--dataset_name {name} names no authors; give --train_file")
    if name not in DATASET_NAMES:
        refuse("--dataset_name", name, f"give one of {', '.join(DATASET_NAMES)}, or --train_file for your own data")
    sources: Sources = {TRAIN: AbstractRows(folder, days)}
    if abstract_files(folder, held_out=True):
        sources[HELD_OUT] = AbstractRows(folder, days, held_out=True)
    return sources


def _file_sources(given: Paths, *, own_validation: bool) -> Sources:
    """The rows of --train_file, and of the validation split of a single DatasetDict."""
    flag = "--train_file"
    paths = find_files(given, flag)
    sources: Sources = {TRAIN: FileRows(paths, flag)}
    if own_validation and len(paths) == 1 and has_validation_split(paths[0], flag):
        sources[HELD_OUT] = FileRows(paths, flag, "validation")
    return sources


class _Chunk(NamedTuple):
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
class _Encode:
    """Rows -> tokens and authors' names. It is sent to the worker processes.

    Attributes:
        make: makes the record of a row.
        encoder: tokenises records.
        day: what chat templates take for today.
    """

    make: MakeRecord
    encoder: Encoder
    day: str | None

    def __call__(self, chunk: _Chunk) -> tuple[Encoded, list[str | None]]:
        with told_date(self.day):
            records = [self.make(row, place) for place, row in chunk.rows]
        if chunk.keep is not None:
            records = [record for record, kept in zip(records, chunk.keep, strict=True) if kept]
        return self.encoder.encoded(records, chunk.first), [record.author for record in records]


@dataclass(frozen=True)
class _Abstracts:
    """Makes the record of an abstract: a fixed prompt, and the abstract as the answer."""

    prompt: str
    maker: RecordMaker

    def __call__(self, row: Row, place: Place) -> Record:  # noqa: ARG002  # all makers of records have one signature
        return self.maker.answered(self.prompt, str(row["abstract"]))


@dataclass(frozen=True)
class _Data:
    """How rows become examples: the arguments of `load_training_data` of the same names."""

    prompt_style: str
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    unit: PrivacyUnit
    seed: int
    users_flag: str | None
    day: str | None

    def loaded(
        self, find: Callable[[], Sources], *, data_cache: str | None, run_folder: Path | None, machine: Machine
    ) -> tuple[TokenizedDataset, TokenizedDataset | None]:
        """The data sets of the sources that `find` returns, made by one process of each machine."""
        folders: list[RowFolder] = []  # the folder of the process that made it

        def make() -> tuple[Path, Splits]:
            encoder, sources = Encoder(self.tokenizer, self.block_size), find()
            key = self._key(sources)
            folder = RowFolder(key, cache=data_cache, run_folder=run_folder, number=machine.rank)
            folders.append(folder)
            return folder.prepare(lambda path: self._make(sources, encoder, path))

        machine.once(lambda: clear_leftovers(run_folder))
        path, splits = machine.once(make)
        try:
            found = {name: open_arrays(path, name, stored, FLAG) for name, stored in splits.items()}
        finally:
            machine.wait()
            for folder in folders:
                folder.discard()
        return found[TRAIN], found.get(HELD_OUT)

    def _key(self, sources: Sources) -> dict[str, object]:
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
            "--privacy_unit": unit.column,
            "--examples_per_unit": unit.examples if bounded else None,
            "--seed": self.seed if bounded else None,
            "--ignore_users": self.users_flag is None,
            TEMPLATE_DATE: self.day,
            "version": [_FORMAT, tokenizers.__version__, transformers.__version__],
        }

    def _make(self, sources: Sources, encoder: Encoder, folder: Path) -> Splits:
        """Write the arrays of every source that has rows."""
        made = {name: self._make_one(name, source, encoder, folder) for name, source in sources.items()}
        return {name: stored for name, stored in made.items() if stored.examples}

    def _make_one(self, name: str, source: Source, encoder: Encoder, folder: Path) -> Stored:
        """Write the arrays of one source."""
        column = self.unit.column if name == TRAIN else None
        keep, authors = None, None
        if column is not None and self.unit.bounds_authors:
            keep, authors = self._chosen(source, column, folder)
        names = NameFile(folder / f"{name}.names") if column is not None and keep is None else None
        with ArrayWriter(folder, name) as writer:
            for encoded, found in self._encoded(name, source, encoder, column, keep):
                writer.add(encoded)
                if names is not None:
                    names.add_all(found)
            if names is not None:
                names.close()
                authors = authors_of_names(names)
                names.remove()
            return writer.stored(authors)

    def _chosen(self, source: Source, column: str, folder: Path) -> tuple[np.ndarray, Authors]:
        """(which rows stay, bool [rows]; who wrote those), from a first reading of the authors alone."""
        names = NameFile(folder / f"{TRAIN}.names")
        for place, row in _shown(numbered(source, column), "authors"):
            names.add_all([author_of(row, column, place)])
        names.close()
        chosen = choose_of_authors(names, self.unit.examples, self.seed)
        names.remove()
        return chosen

    def _encoded(
        self, name: str, source: Source, encoder: Encoder, column: str | None, keep: np.ndarray | None
    ) -> Iterator[tuple[Encoded, list[str | None]]]:
        """The tokens of all rows of a source in order, and their authors."""
        rows = numbered(source, column)
        first = next(rows, None)
        if first is None:
            return
        with told_date(self.day):
            make = self._maker(source, *first, training=name == TRAIN)
        chunks = _chunks(_shown(chain([first], rows), f"{name} rows"), keep)
        yield from in_order(chunks, _Encode(make, encoder, self.day), min(num_processors(), _MOST_WORKERS))

    def _maker(self, source: Source, place: Place, first: Row, *, training: bool) -> MakeRecord:
        """What makes the records of a source, decided by its first row."""
        if not isinstance(source, AbstractRows):
            return RowRecords(
                first,
                place,
                prompt_style=self.prompt_style,
                tokenizer=self.tokenizer,
                author_column=self.unit.column if training else None,
                users_flag=self.users_flag if training else None,
            )
        try:
            prompt = format_prompt(PUBMED_PROMPT, self.prompt_style, self.tokenizer)
        except ChatTemplateError as error:
            refuse("--prompt_style", self.prompt_style, f"{error}; give plain")
        return _Abstracts(prompt, RecordMaker(self.tokenizer))


def _chunks(rows: Iterator[tuple[Place, Row]], keep: np.ndarray | None) -> Iterator[_Chunk]:
    """The rows in chunks. `keep` says of each row whether it becomes an example."""
    read = examples = 0
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        kept = None if keep is None else keep[read : read + len(chunk)]
        read += len(chunk)
        if keep is not None and read > len(keep):
            _refuse_change(chunk[-1][0])
        yield _Chunk(chunk, kept, examples)
        examples += len(chunk) if kept is None else int(kept.sum())
        last = chunk[-1][0]
    if keep is not None and read < len(keep):
        _refuse_change(last)


def _refuse_change(place: Place) -> None:
    place.refuse("other rows than a moment ago; let no other program write the file meanwhile")


def _shown(rows: Iterator[tuple[Place, Row]], what: str) -> Iterator[tuple[Place, Row]]:
    """The same rows. Shows how many were read, if it takes long."""
    return iter(tqdm(rows, desc=f"reading {what}", unit=" rows", unit_scale=True, delay=_QUIET, mininterval=1.0))
