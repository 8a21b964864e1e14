"""Flags of a private Trainer, for `transformers.HfArgumentParser`."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from dptune._validate import refuse, require_delta, require_positive


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
        if self.disable_dp:
            return
        if self.noise_multiplier is None and self.target_epsilon is None:
            refuse("--noise_multiplier", None, "give it or --target_epsilon; --disable_dp trains without privacy")
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            refuse("--target_epsilon", self.target_epsilon, "give it or --noise_multiplier, not both")
        require_positive("--per_sample_max_grad_norm", self.per_sample_max_grad_norm)
        require_positive("--noise_multiplier", 1.0 if self.noise_multiplier is None else self.noise_multiplier)
        require_positive("--target_epsilon", 1.0 if self.target_epsilon is None else self.target_epsilon)
        require_delta(self.target_delta, name="--target_delta")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, without its clipping of the whole gradient, and with `dry_run`."""

    max_grad_norm: float = field(
        default=0.0, metadata={"help": "must stay 0: each example's gradient is clipped, --per_sample_max_grad_norm"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print examples, batch, steps, noise and epsilon; train and write nothing"}
    )
