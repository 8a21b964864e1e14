"""Refuses a model whose buffers change while it trains: running statistics, which no noise covers.

A buffer is saved with the model, and is read by the next forward pass. If examples change it, it reveals something
about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dptune._validate import Described, refuse

_COPIED = 1 << 20  # values; of a larger buffer, being written to counts as a change


class FixedBuffers:
    """Remembers the buffers of a model as they are now.

    A buffer is compared only after it was written to, so asking again is free.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept = {
            name: (buffer, _version(buffer), buffer.clone() if buffer.numel() <= _COPIED else buffer)
            for name, buffer in model.named_buffers()
        }

    def require_unchanged(self) -> None:
        """Compare the buffers with the remembered ones.

        Raises:
            InvalidArgument: one has other values or another shape, or was not there before; the message names it.
        """
        for name, buffer in self._model.named_buffers():
            if self._has_changed(name, buffer):
                reason = "changes while the model trains, and would be released without noise"
                remedy = "keep it as it is, as InstanceNorm does with track_running_stats=False, or use GroupNorm"
                refuse(name, Described(f"buffer of shape {tuple(buffer.shape)}"), f"{reason}; {remedy}")

    def _has_changed(self, name: str, buffer: Tensor) -> bool:
        if name not in self._kept:
            return True
        before, version, values = self._kept[name]
        if buffer is before and version is not None and _version(buffer) == version:
            return False
        if buffer.shape != values.shape or (values is before and _version(before) != version):
            return True
        return not torch.equal(buffer.to(values), values)


def _version(buffer: Tensor) -> int | None:
    """How often it was written to; None for a tensor made in inference mode, where torch does not count."""
    return None if buffer.is_inference() else buffer._version


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put `model` into training or evaluation mode; afterwards, every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
