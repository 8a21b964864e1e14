"""Runs the same thing on the CPU and on the pretend accelerator, and compares the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dptune.sharding import local_part
from tests.pretend_device import moved, register

CLOSE = 3e-6  # difference in norm, relative to the CPU's: sums in another order, in float32


def on_both(make: Callable[[], Any], run: Callable[[Any, torch.device], Any]) -> tuple[Any, Any]:
    """(on the device, on the CPU): what `run` returns for a new model and its device."""
    return run(moved(make()), register()), run(make(), torch.device("cpu"))


def assert_close(found: Tensor, expected: Tensor, *, within: float = CLOSE) -> None:
    """The two have one shape, the expected numbers are not all zero, and the others are close to them in norm."""
    assert found.shape == expected.shape
    found, expected = found.detach().cpu().double(), expected.detach().double()
    size, error = expected.norm().item(), (found - expected).norm().item()
    assert size > 0
    assert error <= within * size, f"off by {error / size:.1e} of the norm"


def gradients(model: nn.Module) -> Tensor:
    """All gradients of a model, or this rank's shards of them, flat on the CPU."""
    return flat(local_part(one.grad) for one in model.parameters() if one.grad is not None)


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([one.detach().cpu().double().flatten() for one in tensors if one is not None])
