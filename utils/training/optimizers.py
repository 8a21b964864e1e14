"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dptune._validate import refuse

if TYPE_CHECKING:  # for types only: modules of flags import this one without loading torch
    import torch
    from torch import nn

OPTIMIZERS = ("adamw", "sgd", "dp-adam")


@dataclass(frozen=True)
class UpdateSettings:
    """How a gradient becomes an update.

    Attributes:
        optimizer: one of OPTIMIZERS.
        learning_rate: the peak learning rate.
        weight_decay: weight decay on all trained parameters; decoupled for both kinds of Adam.
        momentum: momentum of sgd.
        head_learning_rate: the peak learning rate of the classification head; None for `learning_rate`.
        lr_scheduler_type, num_warmup_steps: see `transformers.get_scheduler`.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    momentum: float = 0.0
    head_learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    num_warmup_steps: int = 0


def make_optimizer(
    settings: UpdateSettings,
    parameters: Sequence[nn.Parameter],
    noise_std: Callable[[], float],
    head: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer of `settings` for `parameters`, which include those of a classification `head`. For `noise_std` see
    `dptune.optimizers.DPAdam`."""
    import torch

    from dptune.optimizers import DPAdam

    groups = _groups(settings, parameters, {id(parameter) for parameter in head})
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "dp-adam":
        return DPAdam(groups, noise_std, lr=rate, weight_decay=decay)
    if settings.optimizer != "adamw":
        refuse("optimizer", settings.optimizer, f"give one of {', '.join(OPTIMIZERS)}")
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay)


def _groups(
    settings: UpdateSettings, parameters: Sequence[nn.Parameter], head: Collection[int]
) -> list[dict[str, Any]]:
    """Parameter groups by learning rate: the head (given by identity) comes last, if it has its own rate."""
    if settings.head_learning_rate is None or not head:
        return [{"params": list(parameters)}]
    body = [parameter for parameter in parameters if id(parameter) not in head]
    own = [parameter for parameter in parameters if id(parameter) in head]
    return [{"params": body}, {"params": own, "lr": settings.head_learning_rate}]
