"""The data of train_classifier.py: a GLUE task or a user's file, tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import refuse
from dptune._words import counted
from utils.classification.dataset import ClassificationDataset, tokenize_texts
from utils.classification.glue import GLUE, TRAIN, read_folder, read_hub
from utils.classification.labelled_texts import NamedTexts, read_named_texts
from utils.files.tables import has_validation_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = tuple(GLUE)


@dataclass(frozen=True)
class ClassificationTask:
    """A training set and its validation splits.

    Attributes:
        name: one of TASKS, or the training file's name without its suffix.
        class_names: by class number.
        train: the training set.
        validation: by name of the split; empty if the user gave none.
        metrics: see `utils.classification.metrics.metric_scores`.
        num_texts: texts of a row: 1, or 2 for pairs.
    """

    name: str
    class_names: tuple[str, ...]
    train: ClassificationDataset
    validation: dict[str, ClassificationDataset]
    metrics: tuple[str, ...]
    num_texts: int = 1


def load_task(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    data_dir: str | None = None,
    max_train_examples: int | None = None,
    seed: int = 0,
    suffix: Sequence[int] = (),
) -> ClassificationTask:
    """A GLUE task.

    Args:
        name: one of TASKS.
        tokenizer: the model's.
        max_length: maximum number of tokens per example, counting special tokens; see
            `utils.classification.dataset.tokenize_texts`.
        data_dir: GLUE's TSV files (see `utils.classification.glue.read_folder`); None downloads the hub's copy.
        max_train_examples: number of random rows of the training set to use; see `LabelledTexts.sample`.
        seed: seed of that choice.
        suffix: tokens behind every text; see there too.

    Raises:
        InvalidArgument: naming the flag, its value and the remedy.
    """
    if name not in GLUE:
        refuse("--datasets", name, f"give one of {', '.join(TASKS)}, or --train_file for your own data")
    texts = read_hub(name) if data_dir is None else read_folder(name, data_dir)
    texts[TRAIN] = texts[TRAIN].sample(max_train_examples, seed)
    splits = {split: tokenize_texts(rows, tokenizer, max_length, suffix) for split, rows in texts.items()}
    task = GLUE[name]
    return ClassificationTask(
        name, task.class_names, splits.pop(TRAIN), splits, task.metrics, num_texts=len(task.text_columns)
    )


def load_file_task(
    train_file: str,
    validation_file: str | None,
    *,
    text_columns: Sequence[str],
    label_column: str,
    class_names: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_train_examples: int | None = None,
    seed: int = 0,
    suffix: Sequence[int] = (),
    refuse_users: bool = False,
) -> ClassificationTask:
    """A user's own rows.

    Without `class_names` the classes are all labels of the training file, including rows that `max_train_examples`
    leaves out. The privacy guarantee does not hide these labels.

    Args:
        train_file: a .json, .jsonl, .csv or .parquet file, or a saved DatasetDict.
        validation_file: the same; None uses a DatasetDict's own validation split, if it has one.
        text_columns: one column, or the two columns of a pair.
        label_column: column of text or whole numbers.
        class_names: classes in the order of class numbers, chosen without looking at the rows.
        tokenizer, max_length, max_train_examples, seed, suffix: see `load_task`.
        refuse_users: refuse a training file with a column of users, all of whose rows no epsilon here would cover.

    Raises:
        InvalidArgument: naming the flag, its value and the remedy; never showing a row's content.
    """

    def read(path: str, flag: str, split: str, *, refuse_users: bool = False) -> NamedTexts:
        return read_named_texts(
            path,
            flag=flag,
            split=split,
            text_columns=text_columns,
            label_column=label_column,
            refuse_users=refuse_users,
        )

    named = read(train_file, "--train_file", "train", refuse_users=refuse_users)
    given_by = "the training file's" if class_names is None else "--class_names"
    classes = named.class_names() if class_names is None else tuple(class_names)
    rows = named.numbered(classes, given_by).sample(max_train_examples, seed)
    train = tokenize_texts(rows, tokenizer, max_length, suffix)
    held_out = None
    if validation_file is not None:
        held_out = read(validation_file, "--validation_file", "validation")
    elif has_validation_split(train_file, "--train_file"):
        held_out = read(train_file, "--train_file", "validation")
    validation = {}
    if held_out is not None:
        rows = held_out.numbered(classes, given_by)
        validation["validation"] = tokenize_texts(rows, tokenizer, max_length, suffix)
    name = Path(train_file).resolve().stem
    return ClassificationTask(name, classes, train, validation, ("accuracy",), num_texts=len(text_columns))


def describe_task(task: ClassificationTask) -> list[str]:
    """The task in printable lines. Do not publish counts of the training set other than its size."""
    lines = [f"task                   {task.name}: {', '.join(task.class_names)}"]
    for split, data in {"training": task.train, **task.validation}.items():
        lines.append(f"{split:<23}{counted(len(data), 'example')}, {len(data.ids):,} tokens")
        if data.num_cut:
            lines.append(f"{'':<23}{data.num_cut:,} of them cut to --block_size")
        if data.num_skipped:
            lines.append(f"{'':<23}{counted(data.num_skipped, 'more row')} left out: damaged or without a label")
    return lines
