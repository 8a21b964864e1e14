"""What the training script trains on: a user's file or a data set known by name, tokenised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dptune._validate import refuse
from utils.prompts import PUBMED_PROMPT, format_prompt
from utils.pubmed import FIRST_DAY, LAST_DAY, DayRange, load_abstracts, load_validation_abstracts
from utils.records import Record, joined, load_records
from utils.tables import has_validation_split
from utils.tokenization import TokenizedDataset, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASET_NAMES = ("pubmed_generation",)
DATA_DIR = Path(__file__).resolve().parents[1] / "data"
_Splits = tuple[list[Record], list[Record] | None]


def load_training_data(
    *,
    dataset_name: str | None,
    train_file: str | None,
    validation_file: str | None,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    data_dir: str | Path = DATA_DIR,
    date_from: str = FIRST_DAY,
    date_to: str = LAST_DAY,
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """The training set and, where there is one, the validation set.

    Args:
        dataset_name: one of DATASET_NAMES; exactly one of this and `train_file`.
        train_file: a file or saved DatasetDict (see `utils.records.load_records`).
        validation_file: the same for validation. Without it a DatasetDict's own validation split is taken, or the
            named data set's.
        prompt_style: see `utils.prompts.format_prompt`.
        tokenizer: a fast one.
        block_size: most tokens of an example.
        data_dir: holds a folder for each named data set (`pubmed`).
        date_from, date_to: ISO days, both included, for named data sets that have dates.

    Raises:
        InvalidArgument: naming the flag, its value and the remedy.
    """
    if (dataset_name is None) == (train_file is None):
        refuse("--train_file", train_file, "give exactly one of --train_file and --dataset_name")
    if dataset_name is not None:
        days = DayRange.parse(date_from, date_to)
        train, validation = load_dataset_by_name(
            dataset_name, data_dir=data_dir, prompt_style=prompt_style, tokenizer=tokenizer, days=days
        )
    else:
        train, validation = _load_file(str(train_file), prompt_style, tokenizer, own_validation=validation_file is None)
    if validation_file is not None:
        validation = load_records(
            validation_file,
            flag="--validation_file",
            prompt_style=prompt_style,
            tokenizer=tokenizer,
            split="validation",
        )
    held_out = None if validation is None else tokenize(validation, tokenizer, block_size)
    return tokenize(train, tokenizer, block_size), held_out


def load_dataset_by_name(
    name: str,
    *,
    data_dir: str | Path = DATA_DIR,
    prompt_style: str,
    tokenizer: PreTrainedTokenizerBase,
    days: DayRange,
) -> _Splits:
    """(training records, validation records or None) of a data set that the project knows.

    Raises:
        InvalidArgument: an unknown name, or what `utils.pubmed` refuses.
    """
    if name not in DATASET_NAMES:
        refuse("--dataset_name", name, f"give one of {', '.join(DATASET_NAMES)}, or --train_file for your own data")
    folder = Path(data_dir) / "pubmed"
    prompt = format_prompt(PUBMED_PROMPT, prompt_style, tokenizer)
    train = [joined(prompt, abstract) for abstract in load_abstracts(folder, days)]
    validation = load_validation_abstracts(folder, days)
    return train, None if validation is None else [joined(prompt, abstract) for abstract in validation]


def _load_file(path: str, prompt_style: str, tokenizer: PreTrainedTokenizerBase, *, own_validation: bool) -> _Splits:
    """(training records, the validation split of the same DatasetDict if wanted and there) of --train_file."""
    flag = "--train_file"
    train = load_records(path, flag=flag, prompt_style=prompt_style, tokenizer=tokenizer)
    if not (own_validation and has_validation_split(path, flag)):
        return train, None
    split = "validation"
    return train, load_records(path, flag=flag, prompt_style=prompt_style, tokenizer=tokenizer, split=split)
