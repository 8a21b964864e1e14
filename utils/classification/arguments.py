"""All flags of train_classifier.py, and what a resumed run does about each. Each group of --help has its own module."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from dptune._validate import present
from utils.classification.budget_arguments import BudgetArguments
from utils.classification.checkpoint_arguments import CheckpointArguments
from utils.classification.head_arguments import HeadArguments
from utils.classification.mode_arguments import ModeArguments
from utils.classification.mode_defaults import (
    ModelRates,
    default_head_learning_rate,
    default_learning_rate,
    virtual_tokens,
)
from utils.classification.result_arguments import ResultArguments
from utils.classification.step_arguments import StepArguments
from utils.classification.task_arguments import TaskArguments
from utils.cli.flags import refuse_unread
from utils.training.card_arguments import CardArguments
from utils.training.changes import OnResume, OnResumeTable
from utils.training.optimizers import UpdateSettings
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

    def updates(self, of_model: ModelRates) -> UpdateSettings:
        """The optimizer, which must be known, and its schedule, with the rates that were left open."""
        mode, private = self.mode.finetune_mode, self.budget.enable_dp
        rate = self.steps.learning_rate or default_learning_rate(mode, of_model, private=private)
        usual = (
            rate
            if self.steps.optimizer == "sgd"
            else default_head_learning_rate(mode, of_model, rate=rate, private=private)
        )
        return UpdateSettings(
            optimizer=present(self.steps.optimizer, "optimizer"),
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
