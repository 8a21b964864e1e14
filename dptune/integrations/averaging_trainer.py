"""transformers' Trainer that keeps an average of the weights (`dptune.averaging`): it trains at the weights themselves,
and evaluates, saves and releases their average.

Without `ema` and `average_last` all this is the Trainer's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from transformers.trainer_utils import EvalLoopOutput

from dptune._validate import present
from dptune.averaging import NO_AVERAGE, Averaging
from dptune.integrations.sharded_trainer import ShardedTrainer
from dptune.integrations.state import read_average
from dptune.iterate_average import IterateAverage


class AveragingTrainer(ShardedTrainer):
    """A Trainer whose evaluations and whose best model are of the average of the weights, if it keeps one."""

    _averaging: Averaging = NO_AVERAGE

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's evaluation, of the average of the weights if the training keeps one."""
        with nullcontext() if self._average is None else self._average.in_model():
            found: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        return found

    def _begun_average(self, checkpoint: str | None, steps: int) -> IterateAverage:
        """The average of the weights, new or that of a checkpoint.

        Args:
            checkpoint: the checkpoint's folder; None for a new average.
            steps: all steps of the run.
        """
        average = IterateAverage(self.model, self._averaging, steps)
        if checkpoint is not None and self._resumed is None:  # else it is read with the shards
            read_average(average, checkpoint)
        return average

    def _load_best_model(self) -> None:
        """Load the best checkpoint, and the average that was evaluated there."""
        super()._load_best_model()
        if self._average is not None:
            read_average(self._average, present(self.state.best_model_checkpoint, "best checkpoint"))
