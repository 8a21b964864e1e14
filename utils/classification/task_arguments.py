"""Flags of train_classifier.py: GLUE tasks, or a file of your own."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune._validate import refuse, require_count


@dataclass
class TaskArguments:
    """The training data: --datasets, or --train_file with its columns."""

    _argument_group_name = "data"

    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "GLUE tasks (sst2 qnli qqp mnli), one after another, each with its own model and privacy budget"
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "folder of GLUE's TSV files; default: use the hub"})
    train_file: str | None = field(
        default=None, metadata={"help": "your data, instead of --datasets: JSON, JSONL, CSV, Parquet or DatasetDict"}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "held-out rows, in the same formats; default: a DatasetDict's own, or none"}
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "column of --train_file with the text, or two columns for pairs of texts"}
    )
    label_column: str | None = field(default=None, metadata={"help": "column with the class; default: label"})
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "all classes of --train_file, in order; default: its labels, which then become public"},
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "number of rows to use; default: all"})

    def __post_init__(self) -> None:
        if (self.datasets is None) == (self.train_file is None):
            refuse("--datasets", self.datasets and " ".join(self.datasets), "give either this or --train_file")
        if self.datasets is not None and len(set(self.datasets)) < len(self.datasets):
            refuse("--datasets", " ".join(self.datasets), "names a task twice")
        if self.train_file is not None and not self.text_columns:
            refuse("--text_columns", None, "--train_file needs it: give the column of the texts, or two for pairs")
        if self.train_file is None:
            for flag in ("validation_file", "text_columns", "label_column", "class_names"):
                if getattr(self, flag) is not None:
                    refuse(f"--{flag}", getattr(self, flag), "works only with --train_file; leave it out")
        elif self.data_dir is not None:
            refuse("--data_dir", self.data_dir, "works only with --datasets; leave it out with --train_file")
        if self.labels_in in (self.text_columns or []):
            refuse("--label_column", self.labels_in, "is one of --text_columns, so texts would hold the answer")
        if self.class_names is not None:
            names = self.class_names
            if len(set(names)) < max(2, len(names)) or any(name.strip() != name or not name for name in names):
                refuse("--class_names", " ".join(names), "give two or more, each once, without outer spaces")
        if self.max_train_examples is not None:
            require_count("--max_train_examples", self.max_train_examples)

    @property
    def labels_in(self) -> str:
        """The name of the label column."""
        return self.label_column or "label"
