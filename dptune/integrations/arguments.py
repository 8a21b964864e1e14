"""A private Trainer's own `TrainingArguments`, and what a resumed run compares of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

from dptune._validate import renamed
from dptune.averaging import Averaging
from dptune.integrations.privacy_arguments import FLAGS

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
    found |= averaging_of_trainer(args).identity
    if optimizer is not None:
        for number, group in enumerate(optimizer.param_groups):
            rate = group.get("initial_lr", group["lr"])  # a schedule changes `lr`
            own = {
                name: value for name, value in (group | {"lr": rate}).items() if name not in ("params", "initial_lr")
            }
            found |= {f"optimizer.{number}.{name}": value for name, value in own.items()}
    return {name: value if isinstance(value, int | float | str | None) else str(value) for name, value in found.items()}


def averaging_of_trainer(args: Any) -> Averaging:
    """Which average of the weights a Trainer's arguments ask for; none, if they are transformers' own.

    Raises:
        InvalidArgument: a value outside its range, or two averages.
    """
    with renamed(FLAGS):
        return Averaging(getattr(args, "ema", None), getattr(args, "average_last", None))


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments with `dp_adam`, averages and `dry_run`, and without clipping of the whole gradient."""

    max_grad_norm: float = field(
        default=0.0,
        metadata={"help": "Must stay 0, the default: --clip_norm clips each example's gradient."},
    )
    dp_adam: bool = field(
        default=False,
        metadata={
            "help": "Use AdamW with the known variance of the noise taken out of its second moment, instead of "
            "--optim. Off by default."
        },
    )
    ema: float | None = field(
        default=None,
        metadata={
            "help": "Release an exponential average of the weights after each step, with this decay (such as 0.95), "
            "instead of the last weights. Costs no epsilon. No default."
        },
    )
    average_last: float | None = field(
        default=None,
        metadata={
            "help": "Release the mean of the weights after the last steps, this share of all (such as 0.25), instead "
            "of the last weights. Costs no epsilon. No default."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print examples, batch, steps, noise and epsilon, without training. Off by default."},
    )
