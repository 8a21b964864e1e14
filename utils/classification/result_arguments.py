"""Flags of train_classifier.py: the folder of results, evaluation and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dptune._validate import require_count
from utils.training.output_arguments import OutputArguments


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
