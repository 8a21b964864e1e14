"""Schedules of the learning rate, with the names that they have in transformers, and their values until the last step.

`transformers.get_scheduler` imports PEFT, and with it bitsandbytes: more than a second of each start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from dptune._validate import refuse

if TYPE_CHECKING:  # for types only: modules of flags import this one without loading torch
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

_LAST_RATE = 1e-7  # of "polynomial"


_Shape = Callable[[int, int, float], float]


def _half_cosine(step: int, steps: int, _peak: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step / steps)))


def _to_last_rate(step: int, steps: int, peak: float) -> float:
    """A polynomial of degree 1."""
    return ((peak - _LAST_RATE) * (1 - step / steps) + _LAST_RATE) / peak


# (step of the decay, number of its steps, peak rate) -> what the peak rate is multiplied by
_SHAPES: dict[str, _Shape] = {
    "linear": lambda step, steps, _: max(0.0, (steps - step) / steps),
    "cosine": _half_cosine,
    "cosine_with_restarts": _half_cosine,  # transformers has a single cycle by default
    "polynomial": _to_last_rate,
    "constant": lambda *_: 1.0,
    "constant_with_warmup": lambda *_: 1.0,
}
LR_SCHEDULERS = tuple(_SHAPES)


def make_schedule(name: str, optimizer: Optimizer, *, warmup: int, steps: int) -> LambdaLR:
    """The schedule of this name for the learning rates of an optimizer, which are the peak rates.

    Args:
        name: one of LR_SCHEDULERS.
        optimizer: what is scheduled.
        warmup: number of steps in which the rates rise from 0; "constant" has none.
        steps: number of all steps.

    Raises:
        InvalidArgument: there is no schedule of this name, or the peak rate is not above the last one.
    """
    from torch.optim.lr_scheduler import LambdaLR

    if name not in _SHAPES:
        refuse("lr_scheduler_type", name, f"give one of {', '.join(LR_SCHEDULERS)}")
    peak = optimizer.defaults["lr"]
    if name == "polynomial" and peak <= _LAST_RATE:
        refuse("learning_rate", peak, f"--lr_scheduler_type polynomial ends at {_LAST_RATE:g}; give a larger rate")
    rising = 0 if name == "constant" else warmup
    return LambdaLR(optimizer, partial(_factor, _SHAPES[name], peak=peak, warmup=rising, steps=steps))


def _factor(shape: _Shape, step: int, *, peak: float, warmup: int, steps: int) -> float:
    """What the peak rate is multiplied by after so many steps."""
    if step < warmup:
        return step / warmup
    return shape(step - warmup, max(1, steps - warmup), peak)
