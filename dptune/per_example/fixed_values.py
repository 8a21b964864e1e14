"""Refuses a model that keeps what it saw: buffers or parameters that a forward pass changes, which no noise covers.

They are saved with the model, and are read by the next forward pass. If examples change them, they reveal something
about them. Values are compared, because a write through `.data` leaves no other trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dptune._validate import Described, refuse
from dptune.sharding import local_part, reshard

SMALL = 1 << 16  # values of a parameter that every step can afford to compare
_COPIED = 1 << 12  # bytes; of a larger tensor sums are kept

Chosen = Callable[[str, nn.Parameter], bool]


def every(_name: str, _parameter: nn.Parameter) -> bool:
    """Choose all parameters, for a time in which no optimizer changes one."""
    return True


class FixedValues:
    """Remembers the buffers of a model, and some of its parameters, as they are now.

    Tensors of up to 4 KB are copied. Of a larger one, this keeps the sums of its bits by rows and columns, on its
    device: about as many as the square root of its size. Sharded weights are compared shard by shard, never gathered.

    Args:
        model: its buffers are always compared.
        parameters: (name, parameter) -> whether it is compared too; by default none is.
    """

    def __init__(self, model: nn.Module, parameters: Chosen | None = None) -> None:
        self._model, self._parameters = model, parameters
        self._shapes, self._kept = self._read()

    def require_unchanged(self) -> None:
        """Compare with what is remembered.

        Raises:
            InvalidArgument: a tensor has other values or another shape, or was not there before; the message names it.
        """
        shapes, kept = self._read()
        if shapes == self._shapes and _are_equal(kept, self._kept):
            return
        for name, value, kind in self._now():
            if shapes[name] != self._shapes.get(name) or not _are_equal({name: kept[name]}, self._kept):
                reason = "changes while the model trains, and would be released without noise"
                remedy = "keep it as it is, as InstanceNorm does with track_running_stats=False, or use GroupNorm"
                refuse(name, Described(f"{kind} of shape {tuple(value.shape)}"), f"{reason}; {remedy}")

    def _read(self) -> tuple[dict[str, torch.Size], dict[str, Tensor]]:
        """{name: shape} and {name: what is remembered} of each tensor."""
        now = [(name, value) for name, value, _ in self._now()]
        return {name: value.shape for name, value in now}, {name: _kept(value) for name, value in now}

    def _now(self) -> Iterator[tuple[str, Tensor, str]]:
        """(name, this rank's part, kind) of each tensor."""
        reshard(self._model)
        for name, buffer in self._model.named_buffers():
            yield name, local_part(buffer), "buffer"
        for name, parameter in self._model.named_parameters():
            if self._parameters is not None and self._parameters(name, parameter):
                yield name, local_part(parameter), "parameter"


def _are_equal(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of `now` are as before. The host waits once for each device, not for each tensor."""
    for device in {value.device for value in now.values()}:
        names = [name for name, value in now.items() if value.device == device]
        found, wanted = [now[name] for name in names], [before[name].to(device) for name in names]
        if [len(one) for one in found] != [len(one) for one in wanted]:
            return False
        if not torch.equal(torch.cat(found), torch.cat(wanted)):
            return False
    return True


@torch.no_grad()
def _kept(value: Tensor) -> Tensor:
    """What is remembered of a tensor: its bytes, or sums over them if it is large."""
    if value.is_meta:
        return torch.empty(0, dtype=torch.uint8)
    bits = value.detach().to_dense().reshape(-1).view(torch.uint8)
    if len(bits) <= _COPIED:
        return bits.clone()
    return _sums(bits)


def _sums(bits: Tensor) -> Tensor:
    """Sums of the bytes as whole numbers of 8 bytes, by rows and by columns, and the rest as it is, as bytes.

    Sums in both directions also find a value that has moved, as in a table of counts.
    """
    if bits.storage_offset() % 8:
        bits = bits.clone()
    row = 1 << (len(bits) // 8).bit_length() // 2
    end = len(bits) // (8 * row) * 8 * row
    words = bits[:end].view(torch.int64).view(-1, row)
    return torch.cat([words.sum(0).view(torch.uint8), words.sum(1).view(torch.uint8), bits[end:]])


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
