"""Flags of train_classifier.py, each a titled group of --help."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dptune._validate import refuse, require_count, require_delta, require_positive
from dptune.run.plan import PrivacySettings
from utils.classification.mode_defaults import MODES, default_head_learning_rate, default_learning_rate, virtual_tokens
from utils.training.arguments import LR_SCHEDULERS, OutputArguments
from utils.training.optimizers import OPTIMIZERS, UpdateSettings

# What the engine and shared code call the settings of train_classifier.py.
CLASSIFIER_FLAGS = {
    **dict.fromkeys(("model", "model_name_or_path"), "--model_checkpoint"),
    "block_size": "--max_length",
    "max_tokens_per_device": "--micro_batch_size",
    "rank": "--lora_r",
    "alpha": "--lora_alpha",
    "dropout": "--lora_dropout",
    "targets": "--lora_target_modules",
    "clip_norm": "--max_grad_norm",
    "expected_batch_size": "--batch_size",
    "run_folder": "--output_dir",
    "resume_from": "--resume_from_checkpoint",
}
_EPSILON = 8.0


@dataclass
class CheckpointArguments:
    """What is fine-tuned."""

    _argument_group_name = "model"

    model_checkpoint: str = field(
        default="prajjwal1/bert-tiny",
        metadata={"help": "folder or hub name of an encoder or decoder and its tokenizer"},
    )
    max_length: int = field(default=128, metadata={"help": "most tokens of an example; longer ones are cut"})

    def __post_init__(self) -> None:
        require_count("--max_length", self.max_length, minimum=2)


@dataclass
class ModeArguments:
    """What of it is trained; the classification head always is."""

    _argument_group_name = "what is trained"

    finetune_mode: str = field(default="full", metadata={"help": "see docs/classification.md", "choices": MODES})
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "the adapters' output is scaled by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "share of the adapters' inputs set to zero in training"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "names of the linear layers to adapt; default: the queries and values of attention"},
    )
    num_prepend_tokens: int = field(default=20, metadata={"help": "virtual tokens of a prefix or a soft prompt"})
    prefix_projection: bool = field(
        default=False, metadata={"help": "a prefix is the output of a small network, which is trained in its place"}
    )

    def __post_init__(self) -> None:
        if self.finetune_mode.startswith(("prefix", "soft-prompt")):
            require_count("--num_prepend_tokens", self.num_prepend_tokens)
        if "lora" in self.finetune_mode:
            require_count("--lora_r", self.lora_r)
        if self.prefix_projection and not self.finetune_mode.startswith("prefix"):
            refuse("--prefix_projection", True, f"belongs to a prefix, not to --finetune_mode {self.finetune_mode}")


@dataclass
class TaskArguments:
    """What to train on: --datasets, or --train_file with its columns."""

    _argument_group_name = "data"

    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "GLUE tasks (sst2 qnli qqp mnli), one after another, each with a model and a budget of its own"
        },
    )
    data_dir: str | None = field(default=None, metadata={"help": "folder of GLUE's own TSV files; default: the hub"})
    train_file: str | None = field(
        default=None, metadata={"help": "your own rows in place of --datasets: JSONL or CSV"}
    )
    validation_file: str | None = field(default=None, metadata={"help": "held-out rows in the same formats"})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "of your rows: one, or two for pairs of texts"}
    )
    label_column: str | None = field(default=None, metadata={"help": "of your rows: the class; default: label"})
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "of your rows: all classes, in order; default: the labels, which become public by that"},
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "train on so many rows, chosen by --seed"})

    def __post_init__(self) -> None:
        if (self.datasets is None) == (self.train_file is None):
            refuse("--datasets", self.datasets and " ".join(self.datasets), "give exactly one of it and --train_file")
        if self.datasets is not None and len(set(self.datasets)) < len(self.datasets):
            refuse("--datasets", " ".join(self.datasets), "names a task twice")
        if self.train_file is not None and not self.text_columns:
            refuse("--text_columns", None, "--train_file needs it: the column with the text, or the two of a pair")
        if self.train_file is None:
            for flag in ("validation_file", "text_columns", "label_column", "class_names"):
                if getattr(self, flag) is not None:
                    refuse(f"--{flag}", getattr(self, flag), "belongs to --train_file")
        elif self.data_dir is not None:
            refuse("--data_dir", self.data_dir, "belongs to --datasets")
        if self.labels_in in (self.text_columns or []):
            refuse("--label_column", self.labels_in, "is one of --text_columns, so texts would hold the answer")
        if self.class_names is not None:
            names = self.class_names
            if len(set(names)) < max(2, len(names)) or any(name.strip() != name or not name for name in names):
                refuse("--class_names", " ".join(names), "give at least two, none twice, none with outer blanks")
        if self.max_train_examples is not None:
            require_count("--max_train_examples", self.max_train_examples)

    @property
    def labels_in(self) -> str:
        """The column with the class."""
        return self.label_column or "label"


@dataclass
class BudgetArguments:
    """Everything that decides epsilon, with --batch_size and --epochs."""

    _argument_group_name = "privacy"

    enable_dp: bool = field(default=False, metadata={"help": "train with differential privacy"})
    target_epsilon: float | None = field(
        default=None, metadata={"help": f"with --enable_dp: find the noise for this epsilon; default {_EPSILON:g}"}
    )
    noise_multiplier: float | None = field(
        default=None, metadata={"help": "with --enable_dp: the noise over the clip norm, in place of --target_epsilon"}
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "with --enable_dp: the norm that each example's gradient is clipped to, default: measured, just "
            "above a typical one at the start; without: the norm that a step's gradient is clipped to, default none"
        },
    )
    delta: float = field(
        default=1e-6, metadata={"help": "chance that the bound may fail; below 1 / number of examples"}
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={
            "help": "FOR TESTS: repeatable sampling, noise and dropout, which protect nobody; the report says so"
        },
    )

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            refuse("--target_epsilon", self.target_epsilon, "give it or --noise_multiplier, not both")
        for flag in ("target_epsilon", "noise_multiplier", "max_grad_norm"):
            if getattr(self, flag) is not None:
                require_positive(f"--{flag}", getattr(self, flag))
        require_delta(self.delta, name="--delta")

    def settings(self) -> PrivacySettings | None:
        """The same for the engine; None without privacy. An open --max_grad_norm is measured before."""
        if not self.enable_dp:
            return None
        if self.max_grad_norm is None:
            raise RuntimeError("--max_grad_norm is still open: it is measured before the plan is made")
        return PrivacySettings(
            clip_norm=self.max_grad_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=None if self.noise_multiplier is not None else (self.target_epsilon or _EPSILON),
            delta=self.delta,
        )

    @property
    def clip_norm_is_open(self) -> bool:
        """Whether it is to be measured."""
        return self.enable_dp and self.max_grad_norm is None

    @property
    def plain_max_grad_norm(self) -> float | None:
        """What a step's whole gradient is clipped to without privacy."""
        return None if self.enable_dp else self.max_grad_norm

    @property
    def warning(self) -> str | None:
        """What a user may take for privacy that is none."""
        given = {"--target_epsilon": self.target_epsilon, "--noise_multiplier": self.noise_multiplier}
        for flag, value in given.items():
            if value is not None and not self.enable_dp:
                return f"privacy                NONE: {flag} {value:g} has NO effect without --enable_dp"
        return None


@dataclass
class StepArguments:
    """How it is trained. What fits in memory (--micro_batch_size) changes speed, never epsilon or the gradient."""

    _argument_group_name = "optimisation"

    learning_rate: float | None = field(
        default=None, metadata={"help": "peak rate of the optimizer; default: by mode and privacy, and printed"}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak rate of the classification head; default: --learning_rate, and with privacy measured"},
    )
    epochs: float = field(default=3.0, metadata={"help": "steps are this over the sampling probability"})
    batch_size: int = field(default=256, metadata={"help": "the logical batch in expectation, over all processes"})
    micro_batch_size: int = field(
        default=32, metadata={"help": "examples of --max_length tokens that fit a device in one forward pass"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "see docs/whole_models.md", "choices": OPTIMIZERS})
    weight_decay: float = field(default=0.0, metadata={"help": "of the optimizer, on what is trained"})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "shape of the rate", "choices": LR_SCHEDULERS})
    seed: int = field(
        default=0, metadata={"help": "of the new weights' start; never of the noise, the sampling or the dropout"}
    )

    def __post_init__(self) -> None:
        require_positive("--epochs", self.epochs)
        require_count("--batch_size", self.batch_size)
        require_count("--micro_batch_size", self.micro_batch_size)
        if self.learning_rate is not None:
            require_positive("--learning_rate", self.learning_rate)
        elif self.optimizer == "sgd":
            refuse("--learning_rate", None, "--optimizer sgd needs it: the modes' default rates are AdamW's")
        if self.head_learning_rate is not None:
            require_positive("--head_learning_rate", self.head_learning_rate)
        if not 0 <= self.weight_decay < math.inf:
            refuse("--weight_decay", self.weight_decay, "give a number of at least 0")
        if not 0 <= self.seed < 2**32:
            refuse("--seed", self.seed, "give a whole number of at least 0 and below 2^32")


@dataclass
class ResultArguments:
    """Where results go: a folder for each task below --output_dir."""

    _argument_group_name = "output"

    output_dir: str | None = field(
        default=None, metadata={"help": "default: outputs/classifier-MODE, -dp with privacy"}
    )
    eval_freq: int | None = field(
        default=None, metadata={"help": "steps between evaluations on the validation split; default: an epoch"}
    )
    checkpointing_steps: int = field(default=100, metadata={"help": "steps between checkpoints; 0 writes none"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "a checkpoint, or latest: each task's newest one, else its beginning; finished tasks are kept"
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "print epsilon, noise and steps; train and write nothing"})

    def __post_init__(self) -> None:
        require_count("--checkpointing_steps", self.checkpointing_steps, minimum=0)
        if self.eval_freq is not None:
            require_count("--eval_freq", self.eval_freq)

    def of_task(self, folder: Path) -> OutputArguments:
        """The same for one task's run."""
        return OutputArguments(
            output_dir=str(folder),
            checkpointing_steps=self.checkpointing_steps,
            resume_from_checkpoint=self.resume_from_checkpoint,
            dry_run=self.dry_run,
        )


class Settings(NamedTuple):
    """All groups, in the order of --help."""

    checkpoint: CheckpointArguments
    mode: ModeArguments
    data: TaskArguments
    budget: BudgetArguments
    steps: StepArguments
    results: ResultArguments

    @property
    def folder(self) -> Path:
        """What the tasks' folders lie in."""
        default = f"outputs/classifier-{self.mode.finetune_mode}{'-dp' if self.budget.enable_dp else ''}"
        return Path(self.results.output_dir or default)

    def updates(self, of_head: Callable[[], float]) -> UpdateSettings:
        """The optimizer and its schedule; `of_head` measures the model (`utils.classification.measured_defaults`)."""
        mode, private = self.mode.finetune_mode, self.budget.enable_dp
        rate = self.steps.learning_rate or default_learning_rate(mode, of_head, private=private)
        usual = (
            rate
            if self.steps.optimizer == "sgd"
            else default_head_learning_rate(mode, of_head, rate=rate, private=private)
        )
        return UpdateSettings(
            optimizer=self.steps.optimizer,
            learning_rate=rate,
            head_learning_rate=self.steps.head_learning_rate or usual,
            weight_decay=self.steps.weight_decay,
            lr_scheduler_type=self.steps.lr_scheduler_type,
        )

    @property
    def virtual_tokens(self) -> int:
        """Positions that the mode puts before each text."""
        return virtual_tokens(self.mode.finetune_mode, self.mode.num_prepend_tokens)

    @property
    def token_budget(self) -> int:
        """Tokens, virtual and padded ones too, in one forward pass."""
        return self.steps.micro_batch_size * (self.checkpoint.max_length + self.virtual_tokens)


CLASSIFIER_GROUPS = (CheckpointArguments, ModeArguments, TaskArguments, BudgetArguments, StepArguments, ResultArguments)
