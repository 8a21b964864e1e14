"""Whether any rank was asked to stop. All ranks learn it at the same micro-batch, and no device is waited for.

Requests are combined in main memory, over a group of processes of its own, while devices compute. A value on the device
could be read only after all that the device was given before.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch import distributed as dist

from utils.cli.launch import RANKS_WAIT


class SharedStop:
    """Requests of all ranks, looked at one micro-batch after they were combined. A single process looks at its own.

    Every rank makes one and calls the same methods in the same order.

    Args:
        ranks: number of processes.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._begun: tuple[dist.Work, Tensor] | None = None

    def before_micro_batch(self, asked: bool) -> bool:
        """Whether any rank was asked before the previous call. Call it before each micro-batch of a draw.

        Args:
            asked: whether this rank was asked.
        """
        if self._ranks == 1:
            return asked
        known = self._ended()
        if not known:
            self._begin(asked)
        return known

    def after_draw(self, asked: bool) -> bool:
        """Whether any rank was asked until now. Waits for all ranks."""
        if self._ranks == 1:
            return asked
        before = self._ended()
        self._begin(asked)
        return self._ended() or before

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        return dist.new_group(backend="gloo", timeout=RANKS_WAIT)

    def _begin(self, asked: bool) -> None:
        flag = torch.tensor([int(asked)])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._begun = work, flag

    def _ended(self) -> bool:
        """What was begun last; False if nothing was."""
        begun, self._begun = self._begun, None
        if begun is None:
            return False
        work, flag = begun
        work.wait()
        return bool(flag)
