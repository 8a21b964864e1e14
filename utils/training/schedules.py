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


def _half_cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


# (part of the decay that is done, which may go beyond 1; last rate / peak rate) -> what the peak rate is multiplied by
_SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda done, _: max(0.0, 1 - done),
    "cosine": lambda done, _: _half_cosine(done),
    "cosine_with_restarts": lambda done, _: _half_cosine(done) if done < 1 else 0.0,  # of a single cycle
    "polynomial": lambda done, last: last + (1 - last) * max(0.0, 1 - done),  # of degree 1
    "constant": lambda _done, _last: 1.0,
    "constant_with_warmup": lambda _done, _last: 1.0,
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
    shape, rising = _SHAPES[name], 0 if name == "constant" else warmup
    last = _LAST_RATE / peak if name == "polynomial" else 0.0
    return LambdaLR(optimizer, partial(_factor, shape, last=last, warmup=rising, steps=steps))


def _factor(shape: Callable[[float, float], float], step: int, *, last: float, warmup: int, steps: int) -> float:
    """What the peak rate is multiplied by after so many steps."""
    if step < warmup:
        return step / warmup
    return shape((step - warmup) / max(1, steps - warmup), last)
