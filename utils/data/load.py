"""Loads and tokenises the data of train_clm.py: a user's file or a built-in data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import refuse
from dptune.units.unit import PrivacyUnit, bound_authors, group_by_author
from utils.data.named_sets import DATA_DIR, DATASET_NAMES, FIRST_DAY, LAST_DAY
from utils.data.prompts import PUBMED_PROMPT, ChatTemplateError, format_prompt
from utils.data.pubmed import DayRange, load_abstracts, load_validation_abstracts
from utils.data.records import Record, RecordMaker, load_records
from utils.data.tokenization import TokenizedDataset, tokenize
from utils.files.tables import has_validation_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROW = PrivacyUnit()
_Splits = tuple[list[Record], list[Record] | None]


def load_training_data(
    *,
    dataset_name: str | None,
    train_file: str | None,
    validation_file: str | None,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    data_dir: str | Path | None = None,
    date_from: str = FIRST_DAY,
    date_to: str = LAST_DAY,
    unit: PrivacyUnit = _ROW,
    seed: int = 0,
    users_flag: str | None = None,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The training set and the validation set; None if there is no validation set.

    Args:
        dataset_name: one of DATASET_NAMES; exactly one of this and `train_file`.
        train_file: a file or saved DatasetDict (see `utils.data.records.load_records`).
        validation_file: the same for validation. Without it, the validation split of the DatasetDict or of the
            built-in data set is used.
        prompt_style: see `utils.data.prompts.format_prompt`.
        tokenizer: a fast tokenizer.
        block_size: maximum tokens per example.
        data_dir: holds a folder for each built-in data set (`pubmed`); None for the project's own `data`.
        date_from, date_to: ISO days, inclusive, for built-in data sets with dates.
        unit: the privacy unit. With a column, the training set records each row's author; if the unit bounds authors,
            at most `unit.examples` rows of each are kept.
        seed: chooses which rows of an author are kept.
        users_flag: see `utils.data.records.load_records`; for `train_file` only.

    Raises:
        InvalidArgument: for a mistake in the flags or the data; names the flag, its value and the remedy.
    """
    if (dataset_name is None) == (train_file is None):
        refuse("--train_file", train_file, "give exactly one of --train_file and --dataset_name")
    if dataset_name is not None:
        if unit.column is not None:
            refuse("--privacy_unit", unit.column, f"--dataset_name {dataset_name} names no authors; give --train_file")
        days = DayRange.parse(date_from, date_to)
        train, validation = load_dataset_by_name(
            dataset_name, data_dir=data_dir or DATA_DIR, prompt_style=prompt_style, tokenizer=tokenizer, days=days
        )
    else:
        own = validation_file is None
        train, validation = _load_file(
            str(train_file),
            prompt_style,
            tokenizer,
            own_validation=own,
            author_column=unit.column,
            users_flag=users_flag,
        )
    if validation_file is not None:
        validation = load_records(
            validation_file,
            flag="--validation_file",
            prompt_style=prompt_style,
            tokenizer=tokenizer,
            split="validation",
        )
    held_out = None if validation is None else tokenize(validation, tokenizer, block_size)
    return _by_author(train, unit, seed, tokenizer, block_size), held_out


def _by_author(
    records: list[Record], unit: PrivacyUnit, seed: int, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> TokenizedDataset:
    """The training set, with authors if they are the privacy unit."""
    if unit.column is None:
        return tokenize(records, tokenizer, block_size)
    names = [record.author for record in records]
    authors = group_by_author(names)
    if unit.bounds_authors:
        records, authors = bound_authors(records, names, unit.examples, seed)
    return replace(tokenize(records, tokenizer, block_size), authors=authors)


def load_dataset_by_name(
    name: str,
    *,
    data_dir: str | Path = DATA_DIR,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    days: DayRange,
) -> _Splits:
    """(training records, validation records or None) of a built-in data set.

    Raises:
        InvalidArgument: the name is unknown, or `utils.data.pubmed` refuses the folder.
    """
    if name not in DATASET_NAMES:
        refuse("--dataset_name", name, f"give one of {', '.join(DATASET_NAMES)}, or --train_file for your own data")
    folder = Path(data_dir) / "pubmed"
    maker = RecordMaker(tokenizer)
    try:
        prompt = format_prompt(PUBMED_PROMPT, prompt_style, tokenizer)
    except ChatTemplateError as error:
        refuse("--prompt_style", prompt_style, f"{error}; give plain")
    train = [maker.answered(prompt, abstract) for abstract in load_abstracts(folder, days)]
    validation = load_validation_abstracts(folder, days)
    return train, None if validation is None else [maker.answered(prompt, abstract) for abstract in validation]


def _load_file(
    path: str,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    own_validation: bool,
    author_column: str | None,
    users_flag: str | None,
) -> _Splits:
    """(training records, records of the DatasetDict's validation split or None) of --train_file."""
    flag = "--train_file"
    train = load_records(
        path,
        flag=flag,
        prompt_style=prompt_style,
        tokenizer=tokenizer,
        author_column=author_column,
        users_flag=users_flag,
    )
    if not (own_validation and has_validation_split(path, flag)):
        return train, None
    split = "validation"
    return train, load_records(path, flag=flag, prompt_style=prompt_style, tokenizer=tokenizer, split=split)
