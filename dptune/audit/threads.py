"""Several ranks in one process, a thread each. They communicate as processes do, and what they send can be seen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from dptune.ranks import Ranks

T = TypeVar("T")

_TIMEOUT = 120.0  # seconds that a rank waits for the others
_Heard = Callable[[list[Tensor]], None]


def run_in_threads(world_size: int, work: Callable[[Ranks], T], heard: _Heard | None = None) -> list[T]:
    """[work(ranks) of every rank], all at the same time.

    Args:
        world_size: number of ranks.
        work: what one rank does. If it raises an error on one rank, all ranks end, and the error is raised.
        heard: called once for each `gather`, with what every rank sent.
    """
    if world_size == 1:
        return [work(Ranks())]
    barrier = threading.Barrier(world_size, timeout=_TIMEOUT)
    sent: list[Tensor] = [torch.empty(0)] * world_size
    said: list[object] = [None]

    def gather_of(rank: int) -> Callable[[Tensor], Tensor]:
        def gather(share: Tensor) -> Tensor:
            sent[rank] = share.clone()
            barrier.wait()
            together = torch.cat(sent)
            if rank == 0 and heard is not None:
                heard(list(sent))
            barrier.wait()
            return together

        return gather

    def broadcast_of(rank: int) -> Callable[[object], object]:
        def broadcast(value: object) -> object:
            if rank == 0:
                said[0] = value
            barrier.wait()
            value = said[0]
            barrier.wait()
            return value

        return broadcast

    def guarded(rank: int) -> T:
        try:
            return work(Ranks(rank, world_size, gather=gather_of(rank), broadcast=broadcast_of(rank)))
        except BaseException:
            barrier.abort()  # so that no other rank waits
            raise

    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(guarded, rank) for rank in range(world_size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda one: isinstance(one, threading.BrokenBarrierError)):
        raise error  # the first cause, not the ranks that it ended
    return [future.result() for future in futures]
