"""Several ranks in one process, one thread each, with a gather like `accelerator.gather`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def run_ranks(world_size: int, work: Callable[[int, Callable[[Tensor], Tensor]], T]) -> list[T]:
    """[work(rank, gather) for every rank], all at the same time."""
    shares: list[Tensor] = [torch.empty(0)] * world_size
    barrier = threading.Barrier(world_size, timeout=60)

    def gather_of(rank: int) -> Callable[[Tensor], Tensor]:
        def gather(share: Tensor) -> Tensor:
            shares[rank] = share.clone()
            barrier.wait()
            together = torch.cat(shares)
            barrier.wait()
            return together

        return gather

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(lambda rank: work(rank, gather_of(rank)), range(world_size)))
