"""Flags of training: batch, steps, optimizer and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dptune._validate import present, refuse, require_count, require_positive
from dptune.averaging import Averaging
from utils.training.averaging_flags import AVERAGE_LAST, EMA, averaging_of
from utils.training.optimizers import OPTIMIZERS, UpdateSettings, require_installed

# Schedules of transformers.get_scheduler that need no extra setting.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
MAX_GRAD_NORM = 1.0  # the default of transformers' Trainer


@dataclass
class OptimizationArguments:
    """Batch, steps and optimizer. Memory does not grow with the logical batch."""

    _argument_group_name = "optimisation"

    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "examples of --block_size tokens that fit on a device at a time"}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "average examples per step / (processes x --per_device_train_batch_size)"}
    )
    max_tokens_per_device: int | None = field(
        default=None,
        metadata={"help": "maximum padded tokens per forward pass; default: per-device batch x block size"},
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "average number of passes over the data"})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "steps to train, instead of --num_train_epochs"}
    )
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "dp-adam is AdamW with the noise variance subtracted from the second moment; lowpass-adam takes "
            "the second moment of averaged gradients, for --noise_bands; adamw-8bit and paged-adamw-8bit are AdamW "
            "of bitsandbytes; default: lowpass-adam where noise is correlated, else adamw",
            "choices": OPTIMIZERS,
        },
    )
    momentum: float = field(default=0.0, metadata={"help": "momentum of --optimizer sgd"})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "peak learning rate; default: by privacy, the model's size and what is trained, and is printed"
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay on the trained parameters"})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "schedule of the learning rate", "choices": LR_SCHEDULERS}
    )
    num_warmup_steps: int = field(default=0, metadata={"help": "steps in which the learning rate rises from 0"})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "the same as a share of all steps, instead of --num_warmup_steps"}
    )
    ema: float | None = field(default=None, metadata=EMA)
    average_last: float | None = field(default=None, metadata=AVERAGE_LAST)
    max_grad_norm: float = field(
        default=MAX_GRAD_NORM,
        metadata={"help": "without privacy: maximum norm of a whole step's gradient; 0 turns it off"},
    )
    gradient_sync: str = field(
        default="gather",
        metadata={
            "help": "sum of gradients over processes: gather has a fixed order; reduce sends less with many processes",
            "choices": ("gather", "reduce"),
        },
    )
    gradient_ckpt: bool = field(
        default=False, metadata={"help": "recompute activations: less memory, about a third more time"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the adapters' start; sampling and noise ignore it"})

    @property
    def sync(self) -> Literal["gather", "reduce"]:
        """How gradients are added over ranks, as the engine names it."""
        return "reduce" if self.gradient_sync == "reduce" else "gather"

    @property
    def updates(self) -> UpdateSettings:
        """The optimizer and its schedule. Both must be known, see `utils.training.chosen_defaults`."""
        return UpdateSettings(
            optimizer=present(self.optimizer, "optimizer"),
            learning_rate=present(self.learning_rate, "learning_rate"),
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr_scheduler_type=self.lr_scheduler_type,
            num_warmup_steps=self.num_warmup_steps,
            warmup_ratio=self.warmup_ratio,
        )

    @property
    def averaging(self) -> Averaging:
        """Which average of the weights is released."""
        return averaging_of(self.ema, self.average_last)

    def __post_init__(self) -> None:
        require_count("--per_device_train_batch_size", self.per_device_train_batch_size)
        require_count("--gradient_accumulation_steps", self.gradient_accumulation_steps)
        require_positive("--num_train_epochs", self.num_train_epochs)
        if self.learning_rate is not None:
            require_positive("--learning_rate", self.learning_rate)
        elif self.optimizer == "sgd":
            refuse("--learning_rate", None, "--optimizer sgd needs it: the default learning rates are for Adam")
        require_count("--num_warmup_steps", self.num_warmup_steps, minimum=0)
        require_warmup(self.num_warmup_steps, self.warmup_ratio)
        if self.optimizer is not None:
            require_installed(self.optimizer)
        _ = self.averaging
        if not 0 <= self.max_grad_norm < math.inf:
            refuse("--max_grad_norm", self.max_grad_norm, "give a number above 0, or 0 for no clipping")
        if self.max_train_steps is not None:
            require_count("--max_train_steps", self.max_train_steps)
        if self.max_tokens_per_device is not None:
            require_count("--max_tokens_per_device", self.max_tokens_per_device)
        if not 0 <= self.momentum < 1:
            refuse("--momentum", self.momentum, "give a number in [0, 1)")
        if self.momentum and self.optimizer != "sgd":
            refuse("--momentum", self.momentum, f"belongs to --optimizer sgd, not {self.optimizer or 'the default'}")
        if not 0 <= self.weight_decay < math.inf:
            refuse("--weight_decay", self.weight_decay, "give a number of at least 0")


def require_warmup(steps: int, ratio: float | None) -> None:
    """Refuse a --warmup_ratio outside [0, 1], and one beside --num_warmup_steps."""
    if ratio is None:
        return
    if not 0 <= ratio <= 1:
        refuse("--warmup_ratio", ratio, "give a share of all steps, from 0 to 1")
    if steps:
        refuse("--warmup_ratio", ratio, f"--num_warmup_steps is {steps}; give only one of the two")
