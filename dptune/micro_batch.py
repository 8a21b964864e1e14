"""One micro-batch, as private and plain steps take it: drawn items, losses, and the statistics that they return.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dptune._validate import refuse

Items = Sequence[int] | np.ndarray  # numbers of drawn units


@dataclass(frozen=True)
class MicroBatchStats:
    """What one rank saw in one micro-batch. NOT private: for diagnostics only.

    Attributes:
        losses: one loss per row, [B].
        norms: gradient norm per example (or unit) before clipping; empty in a plain step.
        clipped: whether any part of its gradient was scaled down, bool; empty in a plain step.
    """

    losses: Tensor
    norms: Tensor
    clipped: Tensor


def require_losses(losses: Tensor, rows_per_unit: int) -> None:
    """Refuse anything but one loss per example, [B], with whole units of `rows_per_unit` rows.

    Raises:
        InvalidArgument: another shape, such as a mean, or a unit that is not filled up.
    """
    if losses.ndim != 1:
        remedy = "give one loss per example, [B]; a mean over the micro-batch couples examples and voids the bound"
        refuse("losses.shape", tuple(losses.shape), f"{remedy} (dptune.CausalLMLoss gives them)")
    if len(losses) % rows_per_unit:
        refuse("rows_per_unit", rows_per_unit, f"must divide the {len(losses)} rows; fill units with empty rows")
