"""GLUE's sentence and sentence-pair tasks (Wang et al. 2019), from GLUE's TSV files or from the hub.

The files are tab-separated with a header line and without quoting: a quotation mark is part of the sentence.
Columns are found by name, because copies of the files differ in the order and names of their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np

from dptune._validate import refuse
from utils.classification.labelled_texts import LabelledTexts
from utils.files.tables import require_unique, show_columns

Splits = dict[str, LabelledTexts]
TRAIN = "train"
_HUB_NAMES = ("nyu-mll/glue", "glue")
_FLAG = "--data_dir"
_NO_LABEL = -1  # how the hub's copies mark a row without a label


@dataclass(frozen=True)
class GlueTask:
    """The file format of one task.

    Attributes:
        folder: GLUE's name of the task's folder.
        text_columns: the possible column names of each text; the first one found is used.
        label_columns: the possible column names of the label.
        class_names: in the hub's order. Files hold the name or its number.
        splits: our name of a split -> (file, the hub's name).
        metrics: see `utils.classification.metrics`.
        unlabelled: values that mark a missing label (annotators did not agree, or the label was lost).
        has_broken_lines: whether GLUE's own file has lines that are cut in two. They are left out and counted. In
            other tasks a broken line is refused as a mistake.
    """

    folder: str
    text_columns: tuple[tuple[str, ...], ...]
    label_columns: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {TRAIN: ("train.tsv", "train"), "validation": ("dev.tsv", "validation")}
    )
    metrics: tuple[str, ...] = ("accuracy",)
    unlabelled: tuple[str, ...] = ()
    has_broken_lines: bool = False

    @cached_property
    def class_numbers(self) -> dict[str, int]:
        """Label in a file -> class number."""
        numbers = range(len(self.class_names))
        return dict(zip(self.class_names, numbers, strict=True)) | {str(number): number for number in numbers}


GLUE = {
    "sst2": GlueTask("SST-2", (("sentence", "content", "text"),), ("label",), ("negative", "positive")),
    "qnli": GlueTask("QNLI", (("question",), ("sentence",)), ("label",), ("entailment", "not_entailment")),
    "qqp": GlueTask(
        "QQP",
        (("question1",), ("question2",)),
        ("is_duplicate", "label"),
        ("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        unlabelled=("",),
        has_broken_lines=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        (("sentence1", "premise"), ("sentence2", "hypothesis")),
        ("gold_label", "label"),
        ("entailment", "neutral", "contradiction"),
        splits={
            TRAIN: ("train.tsv", "train"),
            "matched": ("dev_matched.tsv", "validation_matched"),
            "mismatched": ("dev_mismatched.tsv", "validation_mismatched"),
        },
        unlabelled=("-",),
    ),
}


def read_folder(name: str, data_dir: str | Path) -> Splits:
    """All labelled splits of a task from its TSV files.

    Args:
        name: a key of GLUE.
        data_dir: the task's folder, or its parent; the folder has our name or GLUE's (`sst2` or `SST-2`).

    Raises:
        InvalidArgument: a folder, file or column is missing, a line has a wrong number of fields or an unknown label
            (the message names the line), a file is not UTF-8 or has no rows.
    """
    task, folder = GLUE[name], _task_folder(name, Path(data_dir))
    return {split: _read_tsv(task, folder / file) for split, (file, _) in task.splits.items()}


def read_hub(name: str) -> Splits:
    """All labelled splits of a task from the hub, cached by `datasets` (the data are public).

    Raises:
        InvalidArgument: the hub cannot be reached, or its copy is not as expected.
    """
    task, tables = GLUE[name], _load_hub(name)
    missing = [split for _, split in task.splits.values() if split not in tables]
    if missing:
        refuse("--datasets", name, f"the hub's copy has no split {', '.join(missing)}; give GLUE's files with {_FLAG}")
    return {split: _from_table(name, tables[theirs]) for split, (_, theirs) in task.splits.items()}


def _task_folder(name: str, root: Path) -> Path:
    """The first candidate folder that holds a training file."""
    if not root.is_dir():
        refuse(_FLAG, str(root), "no such folder; give the folder that holds the GLUE tasks' folders")
    file, _ = GLUE[name].splits[TRAIN]
    folders = (root / name, root / GLUE[name].folder, root)
    found = next((folder for folder in folders if (folder / file).is_file()), None)
    if found is None:
        refuse(_FLAG, str(root), f"has no {name}/{file} and no {GLUE[name].folder}/{file}; put GLUE's files there")
    return found


def _read_tsv(task: GlueTask, path: Path) -> LabelledTexts:
    """One file."""
    lines = _lines(path)
    header = lines[0].split("\t") if lines else []
    require_unique(header, _FLAG, path)
    *texts_at, label_at = (header.index(column) for column in _columns(task, header, _FLAG, str(path)))
    texts: tuple[list[str], ...] = tuple([] for _ in texts_at)
    labels: list[int] = []
    num_skipped = 0
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        fields = line.split("\t")
        whole = _is_whole(task, len(fields), len(header), path, number)
        if not whole or fields[label_at] in task.unlabelled:
            num_skipped += 1
            continue
        labels.append(_class_number(task, fields[label_at], path, number))
        for column, at in zip(texts, texts_at, strict=True):
            column.append(fields[at])
    if not labels:
        refuse(_FLAG, str(path), "has no labelled rows; put GLUE's own file there")
    return LabelledTexts(texts, np.array(labels, dtype=np.int64), num_skipped)


def _lines(path: Path) -> list[str]:
    """The lines of a file. Only a line feed ends a line; Python's other line separators are text here."""
    if not path.is_file():
        refuse(_FLAG, str(path), "no such file; put GLUE's own file there")
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            return [line.removesuffix("\n").removesuffix("\r") for line in file]
    except UnicodeDecodeError:
        refuse(_FLAG, str(path), "not UTF-8 text; save it as UTF-8")
    except OSError as error:
        refuse(_FLAG, str(path), f"cannot be read ({error.strerror or type(error).__name__}); check its permissions")


def _columns(task: GlueTask, header: Sequence[str], flag: str, value: str) -> list[str]:
    """The column names of the task's texts and, last, of its label."""
    chosen = []
    for names in (*task.text_columns, task.label_columns):
        column = next((name for name in names if name in header), None)
        if column is None:
            found = show_columns(header)
            refuse(flag, value, f"no column {' or '.join(names)} (found {found}); give GLUE's {task.folder} as it is")
        chosen.append(column)
    return chosen


def _is_whole(task: GlueTask, found: int, expected: int, path: Path, line: int) -> bool:
    """Whether a line has one field per column. A broken line is refused unless the task's own file has some."""
    if found != expected and not task.has_broken_lines:
        refuse(_FLAG, str(path), f"line {line} has {found} fields, the header {expected}; fix or remove the line")
    return found == expected


def _class_number(task: GlueTask, label: str, path: Path, line: int) -> int:
    """The number of a class, given by name or number."""
    if label not in task.class_numbers:
        known = ", ".join(task.class_names)
        refuse(_FLAG, str(path), f"line {line} has an unknown label; use one of {known}, or its number counted from 0")
    return task.class_numbers[label]


def _load_hub(name: str) -> datasets.DatasetDict:
    """The hub's copy, under its current name or its former one."""
    tables, why = None, ""
    for path in _HUB_NAMES:
        try:
            tables = datasets.load_dataset(path, name)
            break
        except Exception as error:  # the hub's client, the cache and the file system raise unrelated types
            why = type(error).__name__
            if isinstance(error, ConnectionError):
                break  # the other name would only repeat half a minute of retries
    if tables is None:
        refuse("--datasets", name, f"cannot be loaded from the hub ({why}); give {_FLAG} a folder of GLUE's TSV files")
    return tables


def _from_table(name: str, table: datasets.Dataset) -> LabelledTexts:
    """One split of the hub's copy; its labels are already numbers."""
    task = GLUE[name]
    *texts, label = _columns(task, table.column_names, "--datasets", name)
    labels = np.array(list(table[label]), dtype=np.int64)
    if tuple(getattr(table.features[label], "names", task.class_names)) != task.class_names:
        refuse("--datasets", name, f"the hub's copy has other classes than {task.class_names}; give {_FLAG}")
    if not len(labels) or labels.min() < _NO_LABEL or labels.max() >= len(task.class_names):
        refuse("--datasets", name, f"the hub's copy has rows with an unknown label; give GLUE's files with {_FLAG}")
    kept = np.flatnonzero(labels != _NO_LABEL)
    if not len(kept) or (len(kept) < len(labels) and not task.unlabelled):
        refuse("--datasets", name, f"the hub's copy has rows without a label; give GLUE's files with {_FLAG}")
    columns = [list(table[column]) for column in texts]
    chosen = tuple([column[row] for row in kept] for column in columns)
    return LabelledTexts(chosen, labels[kept], num_skipped=len(labels) - len(kept))
