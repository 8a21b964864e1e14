"""Flags of train_classifier.py: one dataclass per titled group of --help."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dptune._aliases import aliases
from dptune._validate import refuse, renamed, require_count, require_delta, require_positive
from dptune.averaging import Averaging
from dptune.published import published_model
from dptune.run.settings import AUTO, PrivacySettings, noise_bands_of
from utils.classification.head_arguments import HeadArguments
from utils.classification.mode_defaults import MODES, default_head_learning_rate, default_learning_rate, virtual_tokens
from utils.cli.flags import refuse_unread
from utils.training.card_arguments import CardArguments
from utils.training.changes import OnResume, OnResumeTable
from utils.training.optimization_arguments import LR_SCHEDULERS, MAX_GRAD_NORM, averaging_of, require_warmup
from utils.training.optimizers import OPTIMIZERS, UpdateSettings, require_installed
from utils.training.output_arguments import OutputArguments
from utils.training.view_arguments import ViewArguments

# The engine's name of a setting -> the flag of train_classifier.py.
CLASSIFIER_FLAGS = {
    "model": "--model_name_or_path",
    "max_tokens_per_device": "--micro_batch_size",
    "rank": "--lora_r",
    "alpha": "--lora_alpha",
    "dropout": "--lora_dropout",
    "targets": "--lora_target_modules",
    "expected_batch_size": "--batch_size",
    "run_folder": "--output_dir",
    "resume_from": "--resume_from_checkpoint",
    "register": "--register",
}
ONLY_PRIVATE = ("target_epsilon", "noise_multiplier", "delta", "register", "noise_bands")  # only for privacy
_EPSILON = 8.0


@dataclass
class CheckpointArguments:
    """The model to fine-tune."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default="prajjwal1/bert-tiny",
        metadata={
            "help": "folder or hub name of an encoder or decoder with its tokenizer",
            "aliases": aliases("model_checkpoint"),
        },
    )
    block_size: int = field(
        default=128,
        metadata={
            "help": "maximum number of tokens per example; longer ones are cut",
            "aliases": aliases("max_length"),
        },
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = published_model(self.model_name_or_path)
        require_count("--block_size", self.block_size, minimum=2)


@dataclass
class ModeArguments:
    """Which parameters are trained; the classification head always is."""

    _argument_group_name = "what is trained"

    finetune_mode: str = field(
        default="full", metadata={"help": "fine-tuning mode: see docs/how_to/classification.md", "choices": MODES}
    )
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "scale of the adapters: the output is times alpha / r"})
    use_rslora: bool = field(
        default=False, metadata={"help": "rsLoRA: the output is times alpha / sqrt(r) instead of alpha / r"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the inputs of the LoRA adapters"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "names of the linear layers that get LoRA, or all-linear (all but the head); default: attention "
            "queries and values"
        },
    )
    num_prepend_tokens: int = field(default=20, metadata={"help": "virtual tokens of a prefix or soft prompt"})
    prefix_projection: bool = field(
        default=False, metadata={"help": "train a small network that computes the prefix, instead of the prefix"}
    )

    def __post_init__(self) -> None:
        if self.finetune_mode.startswith(("prefix", "soft-prompt")):
            require_count("--num_prepend_tokens", self.num_prepend_tokens)
        if "lora" in self.finetune_mode:
            require_count("--lora_r", self.lora_r)
        if self.prefix_projection and not self.finetune_mode.startswith("prefix"):
            refuse("--prefix_projection", True, f"needs a prefix mode, not --finetune_mode {self.finetune_mode}")


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


@dataclass
class BudgetArguments:
    """Everything that decides epsilon, with --batch_size and --num_train_epochs."""

    _argument_group_name = "privacy"

    enable_dp: bool = field(default=False, metadata={"help": "train with differential privacy"})
    target_epsilon: float | None = field(
        default=None,
        metadata={"help": f"epsilon, with --enable_dp; default: {_EPSILON:g}, unless --noise_multiplier is given"},
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "noise standard deviation / clip norm with --enable_dp; instead of --target_epsilon"},
    )
    clip_norm: float | None = field(
        default=None,
        metadata={
            "help": "clip norm. With --enable_dp, of each example's gradient; default: measured, just above a typical "
            "norm at the start. Without it, of a step's whole gradient; default: 1",
            "aliases": aliases("max_grad_norm"),
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "probability that the epsilon bound fails; default: a tenth of 1 / number of examples, rounded "
            "down to a power of ten"
        },
    )
    register: str | None = field(
        default=None,
        metadata={
            "help": "file with the most that all releases from these data may spend (python -m dptune.budget FILE "
            "--limit EPSILON --delta DELTA makes it); the run is refused if it would exceed that. Default: no limit"
        },
    )
    max_batch: int | None = field(
        default=None,
        metadata={
            "help": "maximum examples per step, over all processes: larger draws are cut, which raises epsilon; "
            "default: draws are not cut"
        },
    )
    noise_bands: str = field(
        default="1",
        metadata={
            "help": "correlate noise over so many steps: less noise in the sum of all steps, more in each; rows then "
            "take turns in so many groups; auto: as many as make the least noise for --target_epsilon; default: 1, "
            "independent noise"
        },
    )
    ignore_users: bool = field(
        default=False,
        metadata={"help": "protect rows although --train_file names users: a user with many rows is protected less"},
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={
            "help": "FOR TESTS: seed for repeatable sampling, noise and dropout. It protects nobody; the report says so"
        },
    )

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            refuse("--target_epsilon", self.target_epsilon, "give --target_epsilon or --noise_multiplier, not both")
        for flag in ("target_epsilon", "noise_multiplier", "clip_norm"):
            if getattr(self, flag) is not None:
                require_positive(f"--{flag}", getattr(self, flag))
        if self.delta is not None:
            require_delta(self.delta, name="--delta")
        if self.max_batch is not None:
            require_count("--max_batch", self.max_batch)
        with renamed({"noise_bands": "--noise_bands"}):
            bands = noise_bands_of(self.noise_bands)
        if bands == AUTO and self.noise_multiplier is not None:
            refuse("--noise_bands", bands, "is chosen for --target_epsilon; give that, or a number of bands")

    def settings(self) -> PrivacySettings | None:
        """The engine's privacy settings; None without privacy. An open --clip_norm must be measured first."""
        if not self.enable_dp:
            return None
        if self.clip_norm is None:
            raise RuntimeError("--clip_norm is not set: measure it before the plan is made")
        return PrivacySettings(
            clip_norm=self.clip_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=None if self.noise_multiplier is not None else (self.target_epsilon or _EPSILON),
            delta=self.delta,
            register=self.register,
            noise_bands=noise_bands_of(self.noise_bands),
        )

    @property
    def clip_norm_is_open(self) -> bool:
        """Whether the clip norm is still to be measured."""
        return self.enable_dp and self.clip_norm is None

    @property
    def plain_max_grad_norm(self) -> float | None:
        """The clip norm of a step's whole gradient in training without privacy."""
        return None if self.enable_dp else self.clip_norm or MAX_GRAD_NORM


@dataclass
class StepArguments:
    """Steps and optimizer. --micro_batch_size changes speed and memory, never epsilon or the gradient."""

    _argument_group_name = "optimisation"

    learning_rate: float | None = field(
        default=None, metadata={"help": "peak learning rate; default: depends on mode and privacy, and is printed"}
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak rate of the classification head; default: --learning_rate, or measured if private"},
    )
    num_train_epochs: float = field(
        default=3.0,
        metadata={
            "help": "average passes over the data: steps x sampling probability",
            "aliases": aliases("epochs", "num_epochs"),
        },
    )
    batch_size: int = field(default=256, metadata={"help": "average number of examples per step, over all processes"})
    micro_batch_size: int = field(
        default=32, metadata={"help": "examples of --block_size tokens that fit on a device in one forward pass"}
    )
    optimizer: str = field(
        default="adamw", metadata={"help": "optimizer: see docs/how_to/whole_models.md", "choices": OPTIMIZERS}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay on the trained parameters"})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "learning rate schedule", "choices": LR_SCHEDULERS}
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "share of all steps in which the learning rate rises from 0; default: none"}
    )
    ema: float | None = field(
        default=None,
        metadata={
            "help": "release an exponential average of the weights after each step, with this decay (such as 0.95), "
            "instead of the last weights; costs no epsilon; default: none"
        },
    )
    average_last: float | None = field(
        default=None,
        metadata={
            "help": "release the mean of the weights after the last steps, this share of all (such as 0.25), instead "
            "of the last weights; costs no epsilon; default: none"
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "seed of new weights and --max_train_examples; never of noise, sampling or dropout"},
    )

    def __post_init__(self) -> None:
        require_positive("--num_train_epochs", self.num_train_epochs)
        require_count("--batch_size", self.batch_size)
        require_count("--micro_batch_size", self.micro_batch_size)
        require_warmup(0, self.warmup_ratio)
        _ = self.averaging
        require_installed(self.optimizer)
        if self.learning_rate is not None:
            require_positive("--learning_rate", self.learning_rate)
        elif self.optimizer == "sgd":
            refuse("--learning_rate", None, "--optimizer sgd needs it: the default learning rates are for AdamW")
        if self.head_learning_rate is not None:
            require_positive("--head_learning_rate", self.head_learning_rate)
        if not 0 <= self.weight_decay < math.inf:
            refuse("--weight_decay", self.weight_decay, "give a number of at least 0")
        if not 0 <= self.seed < 2**32:
            refuse("--seed", self.seed, "give a whole number of at least 0 and below 2^32")

    @property
    def averaging(self) -> Averaging:
        """Which average of the weights is released."""
        return averaging_of(self.ema, self.average_last)


@dataclass
class ResultArguments:
    """Where results go: each task gets a folder in --output_dir."""

    _argument_group_name = "output"

    output_dir: str | None = field(
        default=None, metadata={"help": "folder for results; default: outputs/classifier-MODE, with -dp if private"}
    )
    eval_freq: int | None = field(
        default=None, metadata={"help": "steps between evaluations on the validation split; default: one epoch"}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "evaluations without a lower validation loss after which training ends; default: never"},
    )
    load_best_model_at_end: bool = field(
        default=False, metadata={"help": "release the weights with the lowest validation loss instead of the last"}
    )
    validation_is_public: bool = field(
        default=False,
        metadata={
            "help": "declares that the validation split is public, or of people who are not in the training data: what "
            "it decides is not private"
        },
    )
    checkpointing_steps: int = field(default=100, metadata={"help": "steps between checkpoints; 0 writes none"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "checkpoint, or latest: the newest of each task if there is one; finished tasks are skipped"},
    )
    dry_run: bool = field(default=False, metadata={"help": "print epsilon, noise and steps; train and write nothing"})

    def __post_init__(self) -> None:
        require_count("--checkpointing_steps", self.checkpointing_steps, minimum=0)
        if self.eval_freq is not None:
            require_count("--eval_freq", self.eval_freq)
        self.of_task(Path())  # refuses what the runs would refuse

    def of_task(self, folder: Path) -> OutputArguments:
        """The output settings of one task's run."""
        return OutputArguments(
            output_dir=str(folder),
            early_stopping_patience=self.early_stopping_patience,
            load_best_model_at_end=self.load_best_model_at_end,
            validation_is_public=self.validation_is_public,
            checkpointing_steps=self.checkpointing_steps,
            resume_from_checkpoint=self.resume_from_checkpoint,
            dry_run=self.dry_run,
        )


class Settings(NamedTuple):
    """All groups, in the order of --help."""

    checkpoint: CheckpointArguments
    mode: ModeArguments
    head: HeadArguments
    data: TaskArguments
    budget: BudgetArguments
    steps: StepArguments
    views: ViewArguments
    results: ResultArguments
    card: CardArguments

    def refuse_unread(self, given: Collection[str]) -> None:
        """Refuse flags of privacy, among those that were `given`, without --enable_dp."""
        if not self.budget.enable_dp:
            refuse_unread(given, ONLY_PRIVATE, "is not read without --enable_dp: give that too, or leave it out", *self)

    @property
    def folder(self) -> Path:
        """The parent of the tasks' folders."""
        default = f"outputs/classifier-{self.mode.finetune_mode}{'-dp' if self.budget.enable_dp else ''}"
        return Path(self.results.output_dir or default)

    def updates(self, of_head: Callable[[], float]) -> UpdateSettings:
        """The optimizer and its schedule; `of_head` measures a rate (`utils.classification.measured_defaults`)."""
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
            warmup_ratio=self.steps.warmup_ratio,
        )

    @property
    def virtual_tokens(self) -> int:
        """How many positions the mode adds before each text."""
        return virtual_tokens(self.mode.finetune_mode, self.mode.num_prepend_tokens)

    @property
    def token_budget(self) -> int:
        """Tokens in one forward pass, counting virtual tokens and padding."""
        return self.steps.micro_batch_size * (self.checkpoint.block_size + self.virtual_tokens)


CLASSIFIER_GROUPS = (
    CheckpointArguments,
    ModeArguments,
    HeadArguments,
    TaskArguments,
    BudgetArguments,
    StepArguments,
    ViewArguments,
    ResultArguments,
    CardArguments,
)

# What a resumed run does about a changed flag. Every flag has a class.
ON_RESUME: OnResumeTable = {
    "model_name_or_path": OnResume.COMPARED,
    "block_size": OnResume.REFUSED,
    # what is trained
    "finetune_mode": OnResume.REFUSED,
    "lora_r": OnResume.REFUSED,
    "lora_alpha": OnResume.REFUSED,
    "use_rslora": OnResume.REFUSED,
    "lora_dropout": OnResume.REFUSED,
    "lora_target_modules": OnResume.REFUSED,
    "num_prepend_tokens": OnResume.REFUSED,
    "prefix_projection": OnResume.REFUSED,
    "label_words": OnResume.REFUSED,
    "prompt_suffix": OnResume.REFUSED,
    # the data; each task has a folder of its own, and its tokens and labels are compared
    "datasets": OnResume.RUNTIME,
    "data_dir": OnResume.COMPARED,
    "train_file": OnResume.COMPARED,
    "validation_file": OnResume.EFFECTIVE,
    "text_columns": OnResume.COMPARED,
    "label_column": OnResume.COMPARED,
    "class_names": OnResume.REFUSED,
    "max_train_examples": OnResume.COMPARED,
    # privacy: the defaults depend on other flags, so what follows is compared
    "enable_dp": OnResume.REFUSED,
    "target_epsilon": OnResume.COMPARED,
    "noise_multiplier": OnResume.COMPARED,
    "clip_norm": OnResume.COMPARED,
    "delta": OnResume.COMPARED,
    "register": OnResume.RUNTIME,  # whether there is one is compared; the file may move
    "max_batch": OnResume.REFUSED,
    "noise_bands": OnResume.REFUSED,
    "insecure_test_seed": OnResume.REFUSED,
    "ignore_users": OnResume.RUNTIME,
    # optimisation: likewise
    "learning_rate": OnResume.COMPARED,
    "head_learning_rate": OnResume.COMPARED,
    "num_train_epochs": OnResume.COMPARED,
    "batch_size": OnResume.REFUSED,
    "micro_batch_size": OnResume.RUNTIME,
    "optimizer": OnResume.REFUSED,
    "weight_decay": OnResume.REFUSED,
    "lr_scheduler_type": OnResume.REFUSED,
    "warmup_ratio": OnResume.REFUSED,
    "ema": OnResume.REFUSED,
    "average_last": OnResume.REFUSED,
    "seed": OnResume.REFUSED,
    # views
    "views": OnResume.REFUSED,
    "token_dropout": OnResume.REFUSED,
    # output
    "output_dir": OnResume.RUNTIME,
    "eval_freq": OnResume.RUNTIME,
    "early_stopping_patience": OnResume.REFUSED,
    "load_best_model_at_end": OnResume.REFUSED,
    "validation_is_public": OnResume.REFUSED,
    "checkpointing_steps": OnResume.RUNTIME,
    "resume_from_checkpoint": OnResume.RUNTIME,
    "dry_run": OnResume.RUNTIME,
    # the model card
    "base_model_name": OnResume.RUNTIME,
    "card_license": OnResume.RUNTIME,
    "card_language": OnResume.RUNTIME,
    "card_data": OnResume.RUNTIME,
}
