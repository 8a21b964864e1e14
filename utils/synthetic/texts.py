"""The texts of a comparison: samples from the files, and the held-out texts in two halves.

One half of the held-out texts is the reference that everything is compared with. The other half is one more column
beside the synthetic samples, which shows what real text scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dptune._validate import refuse
from utils.files.cells import Place, require_columns, text_of
from utils.files.tables import read_rows, show_columns
from utils.synthetic.arguments import HELD_OUT, TextArguments
from utils.synthetic.words import words_of

FEWEST_TEXTS = 10


@dataclass(frozen=True)
class Sample:
    """Texts of one file, in random order, without blank ones.

    Attributes:
        texts: N texts.
        rows: the row number of each in its file, counted from 1.
        blank: how many blank rows of the file were left out.
    """

    texts: list[str]
    rows: list[int]
    blank: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, start: int, stop: int | None) -> Sample:
        """The texts from `start` to `stop`, like a slice."""
        return Sample(self.texts[start:stop], self.rows[start:stop], self.blank)

    def words(self) -> list[list[str]]:
        """The words of each text."""
        return [words_of(text) for text in self.texts]


@dataclass(frozen=True)
class Comparison:
    """All texts.

    Attributes:
        columns: the second half of the held-out texts (HELD_OUT), and the synthetic samples, by name.
        reference: the first half of the held-out texts.
        train: all training rows, if given.
    """

    columns: Mapping[str, Sample]
    reference: Sample
    train: Sample | None

    @property
    def synthetic(self) -> dict[str, Sample]:
        """The synthetic columns."""
        return {name: sample for name, sample in self.columns.items() if name != HELD_OUT}

    @property
    def held_out(self) -> list[str]:
        """Both halves of the held-out texts."""
        return [*self.reference.texts, *self.columns[HELD_OUT].texts]

    @property
    def texts_a_column(self) -> int:
        """The number of texts that every column and the reference have at least."""
        return min(len(self.reference), *map(len, self.columns.values()))


def load_comparison(arguments: TextArguments) -> Comparison:
    """Read all files.

    Raises:
        InvalidArgument: a file that `read_rows` refuses, that lacks the column, or that has fewer than 10 texts or no
            word at all. Errors name the row and never show its content.
    """
    seed, most = arguments.seed, arguments.max_texts
    real = arguments.real_column or arguments.text_column
    columns = {
        name: read_sample(file, "--synthetic_file", arguments.text_column, seed, "--text_column").part(0, most)
        for name, file in arguments.named_files.items()
    }
    real_flag = "--text_column" if arguments.real_column is None else "--real_column"
    held_out = read_sample(arguments.held_out_file, "--held_out_file", real, seed, real_flag).part(0, most)
    train = None
    if arguments.train_file is not None:
        train = read_sample(arguments.train_file, "--train_file", real, seed, real_flag)
    for name, file in arguments.named_files.items():
        _require_words(columns[name], "--synthetic_file", file, "the sample drawn from it")
    middle = len(held_out) - len(held_out) // 2
    halves = held_out.part(0, middle), held_out.part(middle, None)
    for half in halves:
        _require_words(half, "--held_out_file", arguments.held_out_file, "one half of its rows")
    return Comparison({HELD_OUT: halves[1], **columns}, halves[0], train)


def read_sample(path: str, flag: str, column: str, seed: int, column_flag: str) -> Sample:
    """All texts of a file that are not blank, in an order that the seed decides."""
    rows = read_rows(path, flag)
    if not any(column in row for row in rows):
        refuse(column_flag, column, f"no such column in {path}, which has {show_columns(rows[0])}; give one of them")
    texts = []
    for number, row in enumerate(rows, start=1):
        place = Place(flag, path, number)
        require_columns(row, (column,), place)
        texts.append(text_of(row, column, place))
    kept = [number for number in np.random.default_rng(seed).permutation(len(texts)) if texts[number].strip()]
    if len(kept) < FEWEST_TEXTS:
        refuse(flag, path, f"has {len(kept)} texts that are not blank; give at least {FEWEST_TEXTS}")
    sample = Sample([texts[number] for number in kept], [int(number) + 1 for number in kept], len(texts) - len(kept))
    _require_words(sample, flag, path, "the file")
    return sample


def _require_words(sample: Sample, flag: str, path: str, what: str) -> None:
    """Refuse texts without any word: words are compared."""
    if not any(map(words_of, sample.texts)):
        refuse(flag, path, f"{what} has no word in it; give a file of texts")
