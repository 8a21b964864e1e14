"""Flags of a private Trainer, for `transformers.HfArgumentParser`."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from dptune._validate import renamed
from dptune.clipping_styles import FLAT, Clipping
from dptune.run.plan import PrivacySettings

# What the engine calls the parameters that these flags set.
FLAGS = {
    "clip_norm": "--per_sample_max_grad_norm",
    "noise_multiplier": "--noise_multiplier",
    "target_epsilon": "--target_epsilon",
    "delta": "--target_delta",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "run_folder": "--output_dir",
    "resume_from": "--resume_from_checkpoint",
}


@dataclass
class PrivacyArguments:
    """Everything that decides epsilon, with the logical batch and the number of steps of `TrainingArguments`.

    Raises:
        InvalidArgument: both or none of the noise multiplier and the target epsilon, or a value outside its range.
    """

    per_sample_max_grad_norm: float = field(
        default=1.0, metadata={"help": "C: the largest gradient norm of one example's contribution"}
    )
    noise_multiplier: float | None = field(
        default=None, metadata={"help": "standard deviation of the noise over the largest gradient norm"}
    )
    target_epsilon: float | None = field(
        default=None, metadata={"help": "find the noise multiplier for this epsilon instead; the run never exceeds it"}
    )
    target_delta: float = field(
        default=1e-7, metadata={"help": "chance that the bound may fail; below 1 / number of examples"}
    )
    disable_dp: bool = field(
        default=False, metadata={"help": "no clipping and no noise: the same sampling and losses without privacy"}
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={"help": "FOR TESTS: repeatable sampling and noise, which protect nobody; the report says so"},
    )

    def __post_init__(self) -> None:
        with renamed(FLAGS):
            self.settings()

    def settings(self, clipping: Clipping = FLAT) -> PrivacySettings | None:
        """The same for the engine; None without privacy."""
        if self.disable_dp:
            return None
        return PrivacySettings(
            clip_norm=self.per_sample_max_grad_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=self.target_epsilon,
            delta=self.target_delta,
            clipping=clipping,
        )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, without its clipping of the whole gradient, and with `dry_run`."""

    max_grad_norm: float = field(
        default=0.0, metadata={"help": "must stay 0: each example's gradient is clipped, --per_sample_max_grad_norm"}
    )
    dp_adam: bool = field(
        default=False,
        metadata={
            "help": "Use AdamW with the known variance of the noise taken out of its second moment, instead of "
            "--optim. Off by default."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print examples, batch, steps, noise and epsilon; train and write nothing"}
    )
