"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dptune.optimizers import DPAdam

OPTIMIZERS = ("adamw", "sgd", "dp-adam")


@dataclass(frozen=True)
class UpdateSettings:
    """How a gradient becomes an update.

    Attributes:
        optimizer: one of OPTIMIZERS.
        learning_rate: its peak.
        weight_decay: of all that is trained; that of the two kinds of Adam is decoupled.
        momentum: of sgd.
        lr_scheduler_type, num_warmup_steps: see `transformers.get_scheduler`.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    momentum: float = 0.0
    lr_scheduler_type: str = "linear"
    num_warmup_steps: int = 0


def make_optimizer(
    settings: UpdateSettings, parameters: Sequence[nn.Parameter], noise_std: Callable[[], float]
) -> torch.optim.Optimizer:
    """The optimizer of `settings` for these parameters; for `noise_std` see `dptune.optimizers.DPAdam`."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "dp-adam":
        return DPAdam(parameters, noise_std, lr=rate, weight_decay=decay)
    assert settings.optimizer == "adamw", settings.optimizer
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
