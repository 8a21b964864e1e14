"""Flags of training: what to train on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from utils.data.named_sets import DATASET_NAMES, FIRST_DAY, LAST_DAY
from utils.data.prompts import PROMPT_STYLES

if TYPE_CHECKING:  # parsing flags loads neither torch nor transformers
    from dptune.units.unit import PrivacyUnit
    from utils.data.forms import NamedColumns
    from utils.data.sources import RowSource


@dataclass
class DataArguments:
    """What to train on: exactly one of --dataset_name and --train_file."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "data set of the hub (org/name), a folder in the hub's layout (./name), or a built-in one: "
            f"{', '.join(DATASET_NAMES)} (see data/README.md)"
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a data set of the hub; by default its default one"}
    )
    dataset_split: str | None = field(
        default=None,
        metadata={
            "help": "split of a data set of the hub to train on; by default train. Its split validation is held out"
        },
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "instructions and answers: JSON, JSONL, CSV, Parquet or a saved DatasetDict; also several of them, "
            "globs, or folders of files of one kind"
        },
    )
    train_file_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "one number above 0 for each value of --train_file: a row of weight 3 is drawn three times as "
            "often as one of weight 1; epsilon is that of the rows drawn most often. By default all are drawn alike"
        },
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={"help": "held-out examples in the same formats; their measured loss is not private"},
    )
    text_column: str | None = field(
        default=None, metadata={"help": "column of texts that are learned whole; by default text"}
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "column of instructions; by default instruction. Needs --answer_column"},
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "column of answers to --prompt_column; by default answer or output"}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "column of conversations; by default messages or conversations"}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder in which --dataset_name looks for its data; by default the project's data/"},
    )
    date_from: str = field(default=FIRST_DAY, metadata={"help": "first day to use of a --dataset_name with dates"})
    date_to: str = field(default=LAST_DAY, metadata={"help": "last day to use of a --dataset_name with dates"})
    block_size: int = field(default=512, metadata={"help": "maximum tokens per example; longer ones are cut"})
    prompt_style: str = field(
        default="plain", metadata={"help": "form of the prompt, see data/README.md", "choices": PROMPT_STYLES}
    )
    data_cache: str | None = field(
        default=None,
        metadata={
            "help": "private folder that keeps the tokenised rows for later runs on the same data; by default they are "
            "in --output_dir until the run has begun, and are not kept"
        },
    )

    @property
    def named(self) -> NamedColumns:
        """The columns that the user named."""
        from utils.data.forms import NamedColumns

        return NamedColumns(self.text_column, self.prompt_column, self.answer_column, self.messages_column)

    def training_rows(self, unit: PrivacyUnit) -> RowSource:
        """Where the training rows come from.

        Raises:
            InvalidArgument: the flags contradict each other, or there are no such data.
        """
        from utils.data.load import source_finder
        from utils.data.row_folder import TRAIN

        find = source_finder(
            dataset_name=self.dataset_name,
            train_file=self.train_file,
            data_dir=self.data_dir,
            date_from=self.date_from,
            date_to=self.date_to,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
            named=self.named,
            unit=unit,
        )
        return find()[TRAIN]
