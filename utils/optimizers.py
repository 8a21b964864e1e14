"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from dptune.optimizers import DPAdam

OPTIMIZERS = ("adamw", "sgd", "dp-adam")


def make_optimizer(
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    noise_std: Callable[[], float],
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS.

    Args:
        name: which.
        parameters: what to train.
        learning_rate, weight_decay: of all of them; the decay of the two kinds of Adam is decoupled.
        momentum: of sgd.
        noise_std: see `dptune.optimizers.DPAdam`.
    """
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if name == "dp-adam":
        return DPAdam(parameters, noise_std, lr=learning_rate, weight_decay=weight_decay)
    assert name == "adamw", name
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
