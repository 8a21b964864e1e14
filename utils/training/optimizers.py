"""Optimizers by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dptune._validate import refuse

if TYPE_CHECKING:  # for types only: modules of flags import this one without loading torch
    import torch
    from torch import nn

EIGHT_BIT, PAGED = "adamw-8bit", "paged-adamw-8bit"  # of bitsandbytes: moments in 8 bits (Dettmers et al. 2022)
OPTIMIZERS = ("adamw", "sgd", "dp-adam", "lowpass-adam", EIGHT_BIT, PAGED)
_ROUNDING = 1e-9  # so that 0.1 of 30 steps is 3 and not 4


@dataclass(frozen=True)
class UpdateSettings:
    """How a gradient becomes an update.

    Attributes:
        optimizer: one of OPTIMIZERS.
        learning_rate: the peak learning rate.
        weight_decay: weight decay on all trained parameters; decoupled for all kinds of Adam.
        momentum: momentum of sgd.
        head_learning_rate: the peak learning rate of the classification head; None for `learning_rate`.
        lr_scheduler_type, num_warmup_steps: see `transformers.get_scheduler`.
        warmup_ratio: warm-up as a share of all steps, instead of `num_warmup_steps`.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    momentum: float = 0.0
    head_learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    num_warmup_steps: int = 0
    warmup_ratio: float | None = None

    def warmup_steps(self, steps: int) -> int:
        """Steps of warm-up of a run with this many steps; of a share, rounded up, as transformers does."""
        return self.num_warmup_steps if self.warmup_ratio is None else math.ceil(self.warmup_ratio * steps - _ROUNDING)


def make_optimizer(
    settings: UpdateSettings,
    parameters: Sequence[nn.Parameter],
    noise_std: Callable[[], float],
    head: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer of `settings` for `parameters`, which include those of a classification `head`. For `noise_std` see
    `dptune.optimizers.DPAdam`."""
    import torch

    from dptune.optimizers import DPAdam, LowPassAdam

    groups = _groups(settings, parameters, {id(parameter) for parameter in head})
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "dp-adam":
        return DPAdam(groups, noise_std, lr=rate, weight_decay=decay)
    if settings.optimizer == "lowpass-adam":
        return LowPassAdam(groups, lr=rate, weight_decay=decay)
    if settings.optimizer in (EIGHT_BIT, PAGED):
        require_installed(settings.optimizer)
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        kind = AdamW8bit if settings.optimizer == EIGHT_BIT else PagedAdamW8bit
        made: torch.optim.Optimizer = kind(groups, lr=rate, weight_decay=decay)
        return made
    if settings.optimizer != "adamw":
        refuse("optimizer", settings.optimizer, f"give one of {', '.join(OPTIMIZERS)}")
    return torch.optim.AdamW(groups, lr=rate, weight_decay=decay)


def require_installed(optimizer: str) -> None:
    """Refuse an optimizer of bitsandbytes without that library."""
    if optimizer in (EIGHT_BIT, PAGED) and find_spec("bitsandbytes") is None:
        refuse("--optimizer", optimizer, "needs bitsandbytes: pip install bitsandbytes, or give adamw")


def require_works(optimizer: str | None, device: torch.device, *, sharded: bool) -> None:
    """Refuse an optimizer that cannot update these parameters.

    Args:
        optimizer: one of OPTIMIZERS; None for the default.
        device: where the trained parameters are.
        sharded: whether they are spread over the ranks.
    """
    if optimizer == PAGED and device.type == "cpu":
        reason = f"its pages are for a GPU with too little memory, and this run is on a CPU; give {EIGHT_BIT}"
        refuse("--optimizer", optimizer, reason)
    if optimizer in (EIGHT_BIT, PAGED) and sharded:
        refuse("--optimizer", optimizer, "bitsandbytes cannot update sharded weights; give adamw")


def _groups(
    settings: UpdateSettings, parameters: Sequence[nn.Parameter], head: Collection[int]
) -> list[dict[str, Any]]:
    """Parameter groups by learning rate: the head (given by identity) comes last, if it has its own rate."""
    if settings.head_learning_rate is None or not head:
        return [{"params": list(parameters)}]
    body = [parameter for parameter in parameters if id(parameter) not in head]
    own = [parameter for parameter in parameters if id(parameter) in head]
    return [{"params": body}, {"params": own, "lr": settings.head_learning_rate}]
