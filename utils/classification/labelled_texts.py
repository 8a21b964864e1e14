"""Texts, or pairs of texts, with a class each, read from a user's own file.

A row is the privacy unit, so every row with a text and a label becomes one example. Class names are saved in the
trained model's configuration. They come from a list that is fixed beforehand; without one they are the training
labels, which are then assumed to be public.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np

from dptune._validate import refuse, require_count
from utils.data.row_authors import refuse_unnoticed_users
from utils.files.cells import Place, is_text, require_columns, text_of
from utils.files.tables import SPLITS, Row, read_rows, show_columns

_MOST_CLASSES = 100  # taken from the labels; a column with more may reveal single rows
_WHOLE = re.compile(r"[+-]?\d+\.0+")  # a whole number, as programs write floating-point ones
_LONGEST_CLASS_NAME = 100  # characters; a longer label is a text in the wrong column, which must not be published


@dataclass(frozen=True)
class LabelledTexts:
    """N labelled rows.

    Attributes:
        texts: one or two columns of N texts.
        labels: class number of each row, int64 [N].
        num_skipped: how many rows of the source are left out because they are damaged or have no label.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int | None, seed: int) -> LabelledTexts:
        """`count` rows chosen at random, in their order; all rows if None.

        The choice depends on the seed and the number of rows, never on their content. The seed is not secret, so this
        sampling does not amplify privacy: epsilon is about the rows that are kept.

        Raises:
            InvalidArgument: `count` is below 1 or above N.
        """
        if count is None:
            return self
        require_count("--max_train_examples", count)
        if count > len(self):
            refuse("--max_train_examples", count, f"the training set has {len(self)} rows; give at most that")
        kept = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        return replace(
            self, texts=tuple([column[row] for row in kept] for column in self.texts), labels=self.labels[kept]
        )


@dataclass(frozen=True)
class NamedTexts:
    """Rows of a user's file, with class names instead of numbers.

    Attributes:
        texts: as in `LabelledTexts`.
        names: the label of each row, as text.
        flag, path: where the rows come from, for errors.
        declared: the classes that a saved DatasetDict declares, in order; None if it declares none.
    """

    texts: tuple[list[str], ...]
    names: list[str]
    flag: str
    path: str
    declared: tuple[str, ...] | None = None

    def class_names(self) -> tuple[str, ...]:
        """The declared classes, or else the labels that occur: whole numbers in order of value, others alphabetically.

        Raises:
            InvalidArgument: there is only one class, there are too many to publish, a number has two spellings, or a
                label may mean that there is none.
        """
        if self.declared is not None:
            return self.declared
        names = set(self.names)
        if len(names) > _MOST_CLASSES:
            told = f"it has more than {_MOST_CLASSES} different labels, which would all become public"
            refuse(self.flag, self.path, f"{told}; if that is intended, list all classes with --class_names")
        if len(names) < 2:
            refuse(self.flag, self.path, "all rows have the same label; give rows of at least two classes")
        if len({_value(name) for name in names}) < len(names):
            refuse(self.flag, self.path, "some labels spell one number in two ways, such as 1 and 1.0; use only one")
        numbers = all(name.removeprefix("-").isdecimal() for name in names)
        if {"-1", "0"} <= names and numbers:
            remedy = "often means no label; drop those rows, or, if it is a class, list all classes with --class_names"
            refuse(self.flag, self.path, f"label -1 beside labels from 0 {remedy}")
        return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))

    def numbered(self, class_names: Sequence[str], given_by: str = "the training file's") -> LabelledTexts:
        """The same rows with class numbers; `given_by` says where the classes come from, for errors.

        Raises:
            InvalidArgument: a row has another class; the message names the row.
        """
        number_of = {name: number for number, name in enumerate(class_names)}
        for row, name in enumerate(self.names, start=1):
            if name not in number_of:
                Place(self.flag, self.path, row).refuse(f"its label is not one of {given_by}; fix it or drop the row")
        return LabelledTexts(self.texts, np.array([number_of[name] for name in self.names], dtype=np.int64))


def read_named_texts(
    path: str | Path,
    *,
    flag: str,
    split: str,
    text_columns: Sequence[str],
    label_column: str,
    refuse_users: bool = False,
) -> NamedTexts:
    """Every row of a file or of a saved DatasetDict's split.

    Args:
        path, flag, split: see `utils.files.tables.read_rows`.
        text_columns: one column, or the two columns of a pair in the order in which the model reads them.
        label_column: holds text or whole numbers; 1, "1" and 1.0 are the same class, because CSV holds only text, and
            tables with empty cells hold whole numbers as floating-point ones.
        refuse_users: refuse a file with a column of users.

    Raises:
        InvalidArgument: what `read_rows` refuses, a missing column, or a value that is not a text or a label. The
            message names the row and does not show the value.
    """
    _require_one_or_two(text_columns)
    saved = _saved_split(path, flag, split)
    rows = read_rows(path, flag, split)
    if refuse_users:
        refuse_unnoticed_users(rows, flag, str(path), None)
    _require_known(rows, path, text_columns, "--text_columns")
    _require_known(rows, path, [label_column], "--label_column")
    texts: tuple[list[str], ...] = tuple([] for _ in text_columns)
    names = []
    for number, row in enumerate(rows, start=1):
        place = Place(flag, str(path), number)
        require_columns(row, [*text_columns, label_column], place)
        _add_texts(texts, row, text_columns, place)
        names.append(_class_name(row, label_column, place))
    kind = None if saved is None else saved.features[label_column]
    if not isinstance(kind, datasets.ClassLabel):
        return NamedTexts(texts, names, flag, str(path))
    declared = tuple(kind.names)
    for number, name in enumerate(names, start=1):
        if not 0 <= int(name) < len(declared):
            Place(flag, str(path), number).refuse(f"{label_column} is not a declared class; give every row a label")
    return NamedTexts(texts, [declared[int(name)] for name in names], flag, str(path), declared)


def read_texts(path: str | Path, *, flag: str, text_columns: Sequence[str]) -> tuple[list[str], ...]:
    """One or two columns of texts, without labels; of a saved DatasetDict, those of its training split.

    Args and errors as those of `read_named_texts`.
    """
    _require_one_or_two(text_columns)
    rows = read_rows(path, flag)
    _require_known(rows, path, text_columns, "--text_columns")
    texts: tuple[list[str], ...] = tuple([] for _ in text_columns)
    for number, row in enumerate(rows, start=1):
        place = Place(flag, str(path), number)
        require_columns(row, text_columns, place)
        _add_texts(texts, row, text_columns, place)
    return texts


def _require_one_or_two(text_columns: Sequence[str]) -> None:
    if not 1 <= len(text_columns) <= 2:
        refuse("--text_columns", list(text_columns), "name one column, or two for pairs of texts")
    if len(set(text_columns)) < len(text_columns):
        refuse("--text_columns", list(text_columns), "names one column twice; a pair has two texts")


def _require_known(rows: Sequence[Row], path: str | Path, columns: Sequence[str], given_by: str) -> None:
    """Refuse a column that no row has."""
    for name in columns:
        if not any(name in row for row in rows):
            found = show_columns(rows[0])
            refuse(given_by, name, f"no such column in {path}, which has {found}; give one of them")


def _add_texts(texts: tuple[list[str], ...], row: Row, text_columns: Sequence[str], place: Place) -> None:
    """Append the texts of a row to their columns."""
    for column, name in zip(texts, text_columns, strict=True):
        column.append(text_of(row, name, place))


def _saved_split(path: str | Path, flag: str, split: str) -> datasets.Dataset | None:
    """The split of a saved DatasetDict, or a saved Dataset; None for anything else, which `read_rows` handles."""
    try:
        saved = datasets.load_from_disk(str(path)) if Path(path).is_dir() else None
    except IndexError:  # raised by the library for a split that was saved without rows
        refuse(flag, str(path), "one of its splits has no rows; add rows or remove the split")
    except (OSError, ValueError, KeyError):
        return None
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    return next((saved[name] for name in SPLITS[split] if name in saved), None)


def _is_score(name: str) -> bool:
    """Whether a label is a number but not a whole one, or not finite."""
    value = _value(name)
    return isinstance(value, float) and not value.is_integer()


def _value(name: str) -> float | str:
    """A label's number, so that 1 and 1.0 are equal; other labels unchanged."""
    try:
        return float(name)
    except ValueError:
        return name


def _class_name(row: Row, column: str, place: Place) -> str:
    """A label as text."""
    value = row[column]
    if isinstance(value, int | np.integer | np.bool_):
        return str(value)
    if isinstance(value, float | np.floating | Decimal):
        value = str(value)  # as CSV holds it
    name = value.strip() if isinstance(value, str) and is_text(value) else ""
    name = name.partition(".")[0] if _WHOLE.fullmatch(name) else name
    if not name or name.lower() == "nan":
        place.refuse(f"{column} holds neither text nor a number; give every row a label")
    if _is_score(name):
        place.refuse(f"{column} is not a whole number; give every row a label, not a score")
    if len(name) > _LONGEST_CLASS_NAME:
        place.refuse(f"{column} has over {_LONGEST_CLASS_NAME} characters, but labels become public names; shorten it")
    return name
