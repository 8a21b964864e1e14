"""The flags of a private Trainer, for `transformers.HfArgumentParser`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import transformers

from dptune._validate import refuse, renamed
from dptune.clipping_styles import FLAT, Clipping
from dptune.run.plan import PrivacySettings

# {the engine's name of a parameter: the flag that sets it}
FLAGS = {
    "clip_norm": "--per_sample_max_grad_norm",
    "noise_multiplier": "--noise_multiplier",
    "target_epsilon": "--target_epsilon",
    "delta": "--target_delta",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "run_folder": "--output_dir",
    "resume_from": "--resume_from_checkpoint",
}
# Arguments that only a private run reads.
ONLY_PRIVATE = ("per_sample_max_grad_norm", "noise_multiplier", "target_epsilon", "target_delta")
NOT_READ = "is not read with --disable_dp: leave one of the two out"


@dataclass
class PrivacyArguments:
    """The privacy settings. Together with the logical batch and the steps of `TrainingArguments` they decide epsilon.

    Raises:
        InvalidArgument: both or neither of the noise multiplier and the target epsilon, a value outside its range, or
            a privacy setting together with `disable_dp`.
    """

    per_sample_max_grad_norm: float = field(
        default=1.0, metadata={"help": "C, the maximum gradient norm per example. Default 1."}
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the noise, divided by C. Give this or --target_epsilon."},
    )
    target_epsilon: float | None = field(
        default=None,
        metadata={"help": "Find the noise multiplier for this epsilon, which the run never exceeds. No default."},
    )
    target_delta: float = field(
        default=1e-7,
        metadata={"help": "Probability with which the bound may fail; below 1 / number of examples. Default 1e-7."},
    )
    disable_dp: bool = field(
        default=False,
        metadata={"help": "Train without clipping and noise, with the same sampling and losses. Off by default."},
    )
    insecure_test_seed: int | None = field(
        default=None,
        metadata={
            "help": "FOR TESTS ONLY: make sampling and noise repeatable. The run then protects nobody, and its report "
            "says so. Off by default."
        },
    )

    def __post_init__(self) -> None:
        if self.disable_dp:
            for one in fields(self):
                value = getattr(self, one.name)
                if one.name in ONLY_PRIVATE and value != one.default:
                    refuse(f"--{one.name}", value, NOT_READ)
        with renamed(FLAGS):
            self.settings()

    def settings(self, clipping: Clipping = FLAT) -> PrivacySettings | None:
        """The same settings as the engine takes them; None without privacy."""
        if self.disable_dp:
            return None
        return PrivacySettings(
            clip_norm=self.per_sample_max_grad_norm,
            noise_multiplier=self.noise_multiplier,
            target_epsilon=self.target_epsilon,
            delta=self.target_delta,
            clipping=clipping,
        )


# Arguments that say how a gradient becomes an update. transformers restores their values of the checkpoint, whatever
# is asked for now, so another value is refused; those of other versions are left out.
_OF_UPDATES = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "optim_args",
    "optim_target_modules",
    "dp_adam",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_ratio",
    "warmup_steps",
)


def updates_identity(args: Any, optimizer: Any = None) -> dict[str, Any]:
    """How a Trainer updates, as JSON values: what a resumed run must share, besides the mechanism.

    Args:
        args: the Trainer's arguments.
        optimizer: the caller's own, if the Trainer was given one; its settings are compared too.
    """
    values = {name: getattr(args, name) for name in _OF_UPDATES if hasattr(args, name)}
    found = {name: getattr(value, "value", value) for name, value in values.items()}  # some are enumerations
    if optimizer is not None:
        for number, group in enumerate(optimizer.param_groups):
            rate = group.get("initial_lr", group["lr"])  # a schedule changes `lr`
            own = {
                name: value for name, value in (group | {"lr": rate}).items() if name not in ("params", "initial_lr")
            }
            found |= {f"optimizer.{number}.{name}": value for name, value in own.items()}
    return {name: value if isinstance(value, int | float | str | None) else str(value) for name, value in found.items()}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments with `dp_adam` and `dry_run`, and without clipping of the whole gradient."""

    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "Must stay 0, the default: --per_sample_max_grad_norm clips each example's gradient."},
    )
    dp_adam: bool = field(
        default=False,
        metadata={
            "help": "Use AdamW with the known variance of the noise taken out of its second moment, instead of "
            "--optim. Off by default."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print examples, batch, steps, noise and epsilon, without training. Off by default."},
    )
