"""One Poisson draw through the model: this rank's micro-batches, in less memory if it runs out, until asked to stop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from dptune._files import atomic_write
from dptune._validate import InvalidArgument, refuse
from dptune.sampling import deal
from dptune.step import MicroBatchStats, PlainStep, PrivateStep
from utils.interruption import StopRequest
from utils.tokenization import TokenizedDataset

BUDGET_NAME = "max_tokens_per_device"

Losses = Callable[..., Tensor]  # (input_ids [B, T], labels [B, T]) -> [B]


def remember_budget(folder: Path, tokens: int) -> None:
    """Leave a token budget for the next launch in this folder, unless a smaller one is there."""
    with atomic_write(folder / BUDGET_NAME) as file:
        file.write(f"{remembered_budget(folder, tokens)}\n")


def remembered_budget(folder: Path, asked: int) -> int:
    """`asked`, or what a launch that ran out of memory found to be too much for it, if that is less."""
    file = folder / BUDGET_NAME
    if not file.exists():
        return asked
    text = file.read_text().strip()
    if not text.isdecimal() or int(text) < 1:
        refuse("--output_dir", str(file), "holds no number of tokens; remove it")
    return min(asked, int(text))


@dataclass
class MicroBatches:
    """The training set, cut for this rank.

    Attributes:
        data: the whole training set.
        token_budget: padded tokens in one forward pass, the same on every rank.
        pad_token_id: fills rows.
        accelerator: the ranks and this rank's device.
        in_step: ranks must make equally many forward passes (their weights are sharded), so none can cut its
            micro-batches smaller than the others. One that runs out of memory ends the launch.
        folder: the run's, where such a rank leaves the budget that the next launch begins with.
    """

    data: TokenizedDataset
    token_budget: int
    pad_token_id: int
    accelerator: Accelerator
    in_step: bool = False
    folder: Path | None = None

    def __post_init__(self) -> None:
        self._fits = self.token_budget  # halved whenever this rank runs out of memory

    def run(
        self, draw: np.ndarray, step: PrivateStep | PlainStep, losses: Losses, stop: StopRequest
    ) -> list[MicroBatchStats] | None:
        """Add the gradients of this rank's share of `draw` to `step`; every rank calls it with the same draw.

        Returns:
            What was seen in each micro-batch that held an example; None once any rank was asked to stop: the step is
            then unfinished, nothing of it was released, and it must not be finished.

        Raises:
            InvalidArgument: a single example, or a micro-batch of ranks that run in step, does not fit in memory.
        """
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        shares = deal(draw, self.data.lengths, token_budget=self.token_budget, ranks=world_size)
        seen: list[MicroBatchStats] = []
        for rows in shares[rank]:
            if self._any_rank(stop.pending):
                return None
            if len(rows):
                seen += self._backward(rows, step, losses)
            else:  # the dummy of a rank that has run out of examples
                step.backward(losses(**self._batch(rows)))
        return None if self._any_rank(stop.pending) else seen

    def gathered(self, values: Iterable[Tensor]) -> Tensor:
        """All ranks' values, which differ in number, in rank order, float64 [n] on the CPU."""
        own = torch.cat([torch.empty(0), *(value.detach().cpu() for value in values)]).tolist()
        return torch.tensor(gather_object(own), dtype=torch.float64)

    def _backward(self, rows: np.ndarray, step: PrivateStep | PlainStep, losses: Losses) -> list[MicroBatchStats]:
        """One micro-batch, in as many pieces as memory asks for. Each example is counted once: a piece adds all or
        nothing to the step."""
        seen: list[MicroBatchStats] = []
        pending = [rows]
        while pending:
            piece, *rest = deal(pending.pop(0), self.data.lengths, token_budget=self._fits, max_padding=1.0)[0]
            pending[:0] = rest
            stats = self._try(piece, step, losses)
            if stats is None:
                self._halve(piece)
                pending.insert(0, piece)
            else:
                seen.append(stats)
        return seen

    def _try(self, rows: np.ndarray, step: PrivateStep | PlainStep, losses: Losses) -> MicroBatchStats | None:
        """None if memory ran out. The exception is gone by then, and with it what its traceback held."""
        try:
            return step.backward(losses(**self._batch(rows)))
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            return None

    def _halve(self, rows: np.ndarray) -> None:
        """Half the budget of what just failed, so that it is cut next time."""
        tokens = int(self.data.lengths[rows].max()) * len(rows)
        if len(rows) == 1:
            raise InvalidArgument(
                f"--block_size: out of memory on a single example of {tokens} tokens; give --gradient_ckpt, a smaller "
                "--block_size, or a launch configuration with FSDP"
            )
        self._fits = min(self._fits, tokens) // 2
        if self.in_step:
            if self.folder is not None:
                remember_budget(self.folder, self._fits)
            raise InvalidArgument(
                f"--max_tokens_per_device={self.token_budget}: out of memory, and ranks with sharded weights cannot "
                f"cut one micro-batch differently; --resume_from_checkpoint latest goes on with {self._fits}"
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"out of memory: rank {self.accelerator.process_index} goes on with {self._fits} tokens at a time")

    def _batch(self, rows: Any) -> dict[str, Tensor]:
        batch = self.data.batch(rows, self.pad_token_id)
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def _any_rank(self, flag: bool) -> bool:
        """Whether it is set on any rank: all learn it at the same micro-batch."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.gather(torch.tensor([flag], device=self.accelerator.device)).any())
