"""Communication between ranks: the sum of their noisy gradients, and the check that they hold the same parameters.

The engine knows no launcher. The program that launches the ranks gives it a `Ranks` value.

P: all trainable parameters, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from dptune._validate import InvalidArgument, present, refuse

Gather = Callable[[Tensor], Tensor]  # [n] on each rank -> [world_size * n] on every rank, in rank order
Reduce = Callable[[Tensor], Tensor]  # [n] on each rank -> the sum over ranks [n], on every rank

Broadcast = Callable[[object], object]  # any object on each rank -> rank 0's, on every rank

_T = TypeVar("_T")

_GATHERED_ELEMENTS = 1 << 24  # gathered from all ranks together at a time: 64 MB, for any number of ranks
_CHECKED_AT_ONCE = 1 << 20
# SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): (shift, odd multiplier).
_PLACE = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_LAST_SHIFT = 31


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, as seen by one of them. The defaults are for a single process.

    Attributes:
        rank: number of this process, from 0; rank 0 writes the files.
        world_size: number of processes.
        gather, broadcast: communication functions; required for several processes.
        reduce: sums over ranks; only needed by a run that uses it instead of `gather`.

    Raises:
        InvalidArgument: several processes without `gather` and `broadcast`.
    """

    rank: int = 0
    world_size: int = 1
    gather: Gather | None = None
    reduce: Reduce | None = None
    broadcast: Broadcast | None = None

    def __post_init__(self) -> None:
        if self.world_size > 1 and (self.gather is None or self.broadcast is None):
            raise InvalidArgument("ranks", self.world_size, "several processes need gather and broadcast")

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def from_main(self, work: Callable[[], _T]) -> _T:
        """Run `work` on rank 0 and return its result on every rank. Every rank must call this.

        If `work` raises `InvalidArgument`, it is raised on all ranks, so that none waits forever.
        """
        if self.broadcast is None:
            return work()
        outcome: tuple[_T | None, InvalidArgument | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except InvalidArgument as error:
                outcome = (None, error)
        value, refusal = cast("tuple[_T, InvalidArgument | None]", self.broadcast(outcome))
        if refusal is not None:
            raise refusal
        return value

    def require_equal(self, parameters: Iterable[Tensor]) -> None:
        """Raise `RuntimeError` on every rank unless all ranks hold the same parameters, bit for bit."""
        if self.gather is not None and self.world_size > 1:
            require_equal(parameters, self.gather)

    def most(self, number: int, device: torch.device) -> int:
        """The largest of all ranks' numbers. Every rank must call this.

        Args:
            number: this rank's.
            device: where ranks communicate.
        """
        if self.gather is None or self.world_size == 1:
            return number
        return int(self.gather(torch.tensor([number], device=device)).max())


ALONE = Ranks()


def sum_over_ranks(
    flat_P: Tensor, *, world_size: int = 1, gather: Gather | None = None, reduce: Reduce | None = None
) -> None:
    """Replace `flat_P` [P] on every rank by the sum over ranks, in slices of bounded size.

    Ranks add in float64. There the sum of values on one grid is exact. So it does not reveal which rank held how much
    of it. With `reduce`, this is an all-reduce: each rank sends 2 P float64 values, for any number of ranks. With
    `gather`, each rank sends P values in the type of `flat_P` to every other rank, and all add in rank order. So the
    result is the same on every rank to the bit.

    Raises:
        InvalidArgument: several ranks with neither `gather` nor `reduce`.
    """
    if world_size == 1:
        return
    if gather is None and reduce is None:
        refuse("gather", None, f"{world_size} processes must communicate; pass gather or reduce")
    size = max(1, _GATHERED_ELEMENTS // world_size)
    for start in range(0, len(flat_P), size):
        part = flat_P[start : start + size]
        if reduce is not None:
            total = reduce(part.double())
        elif gather is not None:
            total = torch.zeros_like(part, dtype=torch.float64)
            for share in gather(part.contiguous()).view(world_size, -1):
                total += share
        part.copy_(total)


def bytes_sent(size: int, *, world_size: int, reduce: bool = False) -> int:
    """Bytes that one rank sends per step to sum `size` float32 values over the ranks, with ring algorithms.

    In a ring all-gather each rank sends N - 1 vectors. In a ring all-reduce it sends 2 (N - 1) / N of one vector
    (Patarasuk and Yuan 2009), in float64.
    """
    others = world_size - 1
    return 2 * 8 * size * others // world_size if reduce else 4 * size * others


def checksum_of(parameters: Iterable[Tensor]) -> Tensor:
    """A 64-bit checksum of the parameters' bits in order, int64 [1]. Different bits almost never give the same one."""
    total, place = None, 0
    for parameter in parameters:
        own = _checksum(parameter.detach().flatten(), place)
        total, place = own if total is None else total + own, place + parameter.numel()
    return present(total, "parameter to check")[None]


def require_equal(parameters: Iterable[Tensor], gather: Gather) -> None:
    """Raise `RuntimeError` on every rank unless all ranks hold the same parameters, bit for bit."""
    seen = gather(checksum_of(parameters)).tolist()
    if len(set(seen)) > 1:
        differing = ", ".join(str(rank) for rank, value in enumerate(seen) if value != seen[0])
        raise RuntimeError(
            f"the trained parameters of rank {differing} differ from rank 0's: the ranks no longer train one model. "
            "Resume from the last checkpoint; if this happens again, look for a faulty device"
        )


def _checksum(flat: Tensor, place: int) -> Tensor:
    """Sum of the values' bits, each mixed with its place among all parameters, in wrapping int64 arithmetic; []."""
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _CHECKED_AT_ONCE):
        part = flat[start : start + _CHECKED_AT_ONCE]
        bits = part.view(_WORDS[part.element_size()]).to(torch.int64)
        first = place + start + 1
        places = torch.arange(first, first + len(part), dtype=torch.int64, device=flat.device)
        total += _mixed(bits + places * _PLACE).sum()
    return total


def _mixed(words: Tensor) -> Tensor:
    """Scramble each word, so that small changes of several words do not cancel in the sum."""
    for shift, factor in _ROUNDS:
        words = _folded(words, shift) * factor
    return _folded(words, _LAST_SHIFT)


def _folded(words: Tensor, shift: int) -> Tensor:
    return words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))  # the mask: >> repeats the sign


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
