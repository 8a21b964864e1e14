"""Two ranks on the pretend accelerator, of which one is here: the other holds and sends what this one does.

So weights are sharded by FSDP2 in one process, and their collectives are counted. The numbers are not those of a real
model, because every other row is a copy. They are the same on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param

from tests.pretend_device import NAME, count_operation, register, values_of

COLLECTIVES = ("all_gather", "all_to_all", "all_reduce")
_BACKEND = "pretend_twice"


@contextmanager
def two_ranks() -> Iterator[None]:
    """This process is rank 0 of 2 inside the block. FSDP keeps the memory of gathered weights."""
    register()
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, lambda _store, rank, size, _time: _Twice(rank, size), devices=_DEVICES)
    dist.init_process_group(_BACKEND, rank=0, world_size=2, store=dist.HashStore())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("free_storage", "alloc_storage"):  # the device has no allocator that could resize a storage
            patch.setattr(_fsdp_param, name, lambda *_: None)
        try:
            yield
        finally:
            dist.destroy_process_group()


_DEVICES = [NAME, "cpu"]


class _Done(dist.Work):
    """A collective that has ended."""

    def wait(self, _timeout: Any = None) -> bool:
        return True


class _Twice(dist.ProcessGroup):
    """What both ranks send is what this one sends."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._ranks = size

    def size(self) -> int:
        return self._ranks

    def getBackendName(self) -> str:
        return _BACKEND

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def all_gather_single(self, output: Tensor, input: Tensor, _options: Any = None) -> dist.Work:
        return _copied("all_gather", output, [input] * self._ranks)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, sizes: list[int], _sent: list[int], _options: Any = None
    ) -> dist.Work:
        return _copied("all_to_all", output, [input[:size] for size in sizes])

    def allreduce(self, tensors: list[Tensor], _options: Any = None) -> dist.Work:
        for tensor in tensors:
            values_of(tensor).mul_(self._ranks)
        count_operation("all_reduce")
        return _Done()

    _allgather_base, alltoall_base = all_gather_single, all_to_all_single  # their names in torch 2.11


def _copied(name: str, output: Tensor, parts: list[Tensor]) -> dist.Work:
    found, start = values_of(output).view(-1), 0
    for part in map(values_of, parts):
        found[start : start + part.numel()] = part.flatten()
        start += part.numel()
    count_operation(name)
    return _Done()
