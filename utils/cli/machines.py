"""Work that one process of each machine does for all processes there, such as making files on the machine's disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from dptune._validate import InvalidArgument

if TYPE_CHECKING:
    from accelerate import Accelerator

_T = TypeVar("_T")

Gather = Callable[[object], list[object]]  # any object on each rank -> those of all ranks, in rank order
# How long ranks wait for such work, which may take hours. If a process dies, the launcher ends the others.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Machine:
    """The processes of one machine, as seen by one of them. The defaults are for a single process.

    Attributes:
        rank: number of this process among those of all machines.
        local_rank: its number on this machine; 0 does the work.
        gather: needed with several processes; waits as long as the work takes.
    """

    rank: int = 0
    local_rank: int = 0
    gather: Gather | None = None

    @property
    def works(self) -> bool:
        """Whether this process does the work of its machine."""
        return self.local_rank == 0

    def once(self, work: Callable[[], _T]) -> _T:
        """Run `work` in one process of each machine, and return its result on every process there.

        Every rank must call it, and all wait for all machines. If `work` raises `InvalidArgument` on a machine, it is
        raised on all ranks of all machines.
        """
        if self.gather is None:
            return work()
        outcome: tuple[_T | None, InvalidArgument | None] = (None, None)
        if self.works:
            try:
                outcome = (work(), None)
            except InvalidArgument as error:
                outcome = (None, error)
        found = cast("list[tuple[_T, InvalidArgument | None]]", self.gather(outcome))
        for _, refusal in found:
            if refusal is not None:
                raise refusal
        return found[self.rank - self.local_rank][0]

    def wait(self) -> None:
        """Wait until every rank of every machine has called this."""
        if self.gather is not None:
            self.gather(None)


ALONE = Machine()


def machine_of(accelerator: Accelerator) -> Machine:
    """The machine of this process. Every rank must call it: it makes a group that waits longer than the others."""
    if accelerator.num_processes == 1:
        return ALONE
    from torch import distributed

    group, ranks = distributed.new_group(backend="gloo", timeout=_PATIENCE), accelerator.num_processes

    def gather(value: object) -> list[object]:
        found: list[object] = [None] * ranks
        distributed.all_gather_object(found, value, group=group)
        return found

    return Machine(accelerator.process_index, accelerator.local_process_index, gather)
