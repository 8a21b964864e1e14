"""What a training run saves so that it can be resumed, and what a resumed run must share with it.

The state of sampling and noise is not saved: a resumed run draws fresh secret randomness. So a step after the
checkpoint that runs again is another release, and the ledger counts both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dptune._validate import refuse
from dptune.adapter_files import adapter_state_dict
from dptune.iterate_average import IterateAverage
from dptune.ledger import LEDGER_NAME, Ledger, has_begun
from dptune.run.checkpoint import TrainingState, find_checkpoint, load_checkpoint
from dptune.run.folder import refuse_existing_run
from dptune.run.identity import refuse_other_run
from dptune.run.session import PrivateRun, SavedRun
from dptune.run.training_state import put_back, write_checkpoint
from utils.models.trainable import parameters_by_name
from utils.training.log import DIAGNOSTICS_NAME
from utils.training.optimization_arguments import OptimizationArguments
from utils.training.output_arguments import OutputArguments

OTHER_FILES = ("model", DIAGNOSTICS_NAME)  # further signs of a run, besides the files that the engine knows


def find_saved_run(output: OutputArguments) -> TrainingState | None:
    """The checkpoint that --resume_from_checkpoint names; None for a new run. The main process calls it.

    Raises:
        InvalidArgument: the folder of a new run already holds a run, or the checkpoint is not of the folder's run.
    """
    folder = Path(output.output_dir)
    if output.resume_from_checkpoint is None:
        if not output.dry_run:
            refuse_existing_run(folder, OTHER_FILES)
        return None
    checkpoint = find_checkpoint(output.output_dir, output.resume_from_checkpoint)
    if checkpoint is None:
        if has_begun(folder / LEDGER_NAME):
            remedy = "a run started there but saved no checkpoint; give a new --output_dir"
            refuse("--resume_from_checkpoint", output.resume_from_checkpoint, remedy)
        return None
    state = load_checkpoint(checkpoint)
    if state.ledger_steps:
        ledger = Ledger(folder / LEDGER_NAME, group_size=state.identity.get("group_size", 1))
        ledger.require_continues(checkpoint / LEDGER_NAME, state.ledger_steps)
    return state


def refuse_other_beginning(saved: TrainingState, known: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that differs from the known part of this run's identity."""
    refuse_other_run({name: value for name, value in saved.identity.items() if name in known}, known)


def processes_of_plan(saved: TrainingState | None, optimization: OptimizationArguments, num_processes: int) -> int:
    """The number of processes that the logical batch is computed with.

    A run that is resumed on more or fewer processes keeps its logical batch. With unchanged flags, this is the number
    of processes that it started with. With flags adjusted to the new number, it is the new number.
    """
    if saved is None:
        return num_processes
    per_process = optimization.per_device_train_batch_size * optimization.gradient_accumulation_steps
    began_with = int(saved.config["num_processes"])
    return num_processes if per_process * num_processes == saved.identity["expected_batch_size"] else began_with


@dataclass(frozen=True)
class Checkpoints:
    """Saves one run; the main process writes.

    Attributes:
        run: the run to save.
        config: the resolved settings.
        every: steps between checkpoints; 0 writes none.
        keep: number of checkpoints to keep; None keeps all.
        trained: names of the model's own parameters, if they are trained; None for adapters.
    """

    run: PrivateRun
    config: dict[str, Any]
    every: int
    keep: int | None
    trained: Sequence[str] | None = None

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        *,
        more: Callable[[], Mapping[str, bytes]] = dict,
        average: IterateAverage | None = None,
    ) -> None:
        """Write a checkpoint; every rank calls it. Sharded weights are written by all ranks. For `more` and `average`
        see `write_checkpoint`."""
        write_checkpoint(
            self.run,
            model,
            optimizer,
            schedule,
            keep=self.keep,
            whole=lambda: self._weights(model),
            config=self.config,
            more=more,
            average=average,
        )

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        return adapter_state_dict(model) if self.trained is None else parameters_by_name(model, self.trained)

    @property
    def due(self) -> bool:
        """Whether to save now: after every few steps, and after the last."""
        completed = self.run.completed
        return self.every > 0 and (completed % self.every == 0 or completed == self.run.last)


def saved_run(saved: TrainingState | None, folder: Path) -> SavedRun | None:
    """The part of a checkpoint that the engine needs."""
    return None if saved is None else SavedRun.of(saved, folder / f"checkpoint-{saved.step}")


def restore(
    saved: TrainingState | None,
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LambdaLR,
    average: IterateAverage | None = None,
) -> None:
    """Load a checkpoint into model, optimizer, schedule and average, the same on every rank, which must all call this.

    Learning rates, weight decay and momentum, and the shape of the schedule, stay those that optimizer and schedule
    were made with. Loading alone would bring back the checkpoint's, whatever the user asks for now.
    """
    if saved is None:
        return
    made = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    put_back(saved, model, optimizer, average)
    for group, own in zip(optimizer.param_groups, made, strict=True):
        group.update(own)
    _continue(schedule, saved.schedule)


def _continue(schedule: LambdaLR, saved: Mapping[str, Any]) -> None:
    """Move a new schedule to where a saved one was, with its own rates and shape."""
    schedule.load_state_dict({name: value for name, value in saved.items() if name not in ("base_lrs", "_last_lr")})
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [rate * factor(schedule.last_epoch) for rate, factor in rates]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
