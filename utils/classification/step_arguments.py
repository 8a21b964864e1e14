"""Flags of train_classifier.py: batch, steps, optimizer and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dptune._aliases import aliases
from dptune._validate import refuse, require_count, require_positive
from dptune.averaging import Averaging
from utils.training.averaging_flags import AVERAGE_LAST, EMA, averaging_of
from utils.training.optimization_arguments import LR_SCHEDULERS, require_warmup
from utils.training.optimizers import OPTIMIZERS, require_installed


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
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "optimizer: see docs/how_to/whole_models.md; default: lowpass-adam with noise bands, else adamw",
            "choices": OPTIMIZERS,
        },
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay on the trained parameters"})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "learning rate schedule", "choices": LR_SCHEDULERS}
    )
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "share of all steps in which the learning rate rises from 0; default: none"}
    )
    ema: float | None = field(default=None, metadata=EMA)
    average_last: float | None = field(default=None, metadata=AVERAGE_LAST)
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
        if self.optimizer is not None:
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
