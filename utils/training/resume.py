"""What a training run saves to go on after a crash, and what a resumed run must share with it.

Sampling and noise are not saved: a resumed run takes fresh secret randomness, so a step that ran beyond the checkpoint
is another release when it runs again, and the ledger counts both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dptune._validate import refuse
from dptune.adapter_files import adapter_state_dict
from dptune.ledger import Ledger, has_begun
from dptune.run.checkpoint import LEDGER_NAME, TrainingState, find_checkpoint, load_checkpoint, save_checkpoint
from dptune.run.folder import refuse_existing_run
from dptune.run.identity import refuse_other_run
from dptune.run.session import PrivateRun, SavedRun
from utils.models.trainable import MODEL_NAME, parameters_by_name
from utils.training.arguments import OptimizationArguments, OutputArguments
from utils.training.log import DIAGNOSTICS_NAME

OTHER_FILES = (MODEL_NAME, DIAGNOSTICS_NAME)  # that tell of a run, beside those the engine knows


def find_saved_run(output: OutputArguments) -> TrainingState | None:
    """What --resume_from_checkpoint names; None for a run that begins. The main process calls it.

    Raises:
        InvalidArgument: a run would begin in a folder that holds one already, or the checkpoint is not of that run.
    """
    folder = Path(output.output_dir)
    if output.resume_from_checkpoint is None:
        if not output.dry_run:
            refuse_existing_run(folder, OTHER_FILES)
        return None
    checkpoint = find_checkpoint(output.output_dir, output.resume_from_checkpoint)
    if checkpoint is None:
        if has_begun(folder / LEDGER_NAME):
            remedy = "a run began there and saved no checkpoint; give a new --output_dir"
            refuse("--resume_from_checkpoint", output.resume_from_checkpoint, remedy)
        return None
    state = load_checkpoint(checkpoint)
    if state.ledger_steps:
        ledger = Ledger(folder / LEDGER_NAME, group_size=state.identity.get("group_size", 1))
        ledger.require_continues(checkpoint / LEDGER_NAME, state.ledger_steps)
    return state


def refuse_other_beginning(saved: TrainingState, known: Mapping[str, Any]) -> None:
    """Hold a checkpoint against the part of a run's identity that is known before its model is loaded."""
    refuse_other_run({name: value for name, value in saved.identity.items() if name in known}, known)


def processes_of_plan(saved: TrainingState | None, optimization: OptimizationArguments, num_processes: int) -> int:
    """The number of processes that the logical batch is computed with.

    A run that is resumed on more or fewer processes keeps its logical batch: with unchanged flags that is the number it
    began with, with flags that were changed to make up for it the present one.
    """
    if saved is None:
        return num_processes
    per_process = optimization.per_device_train_batch_size * optimization.gradient_accumulation_steps
    began_with = int(saved.config["num_processes"])
    return num_processes if per_process * num_processes == saved.identity["expected_batch_size"] else began_with


@dataclass(frozen=True)
class Checkpoints:
    """Saves and restores one run; the main process writes.

    Attributes:
        run: what is saved.
        config: the resolved settings.
        every: steps between checkpoints; 0 for none.
        keep: how many are kept; None keeps all.
        trained: names of the model's own parameters, if they are trained; None for adapters.
    """

    run: PrivateRun
    config: dict[str, Any]
    every: int
    keep: int | None
    trained: Sequence[str] | None = None

    def save(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
        """Write what the run needs to be resumed; every rank calls it."""
        run = self.run
        if run.ranks.is_main:
            state = TrainingState(
                step=run.completed,
                ledger_steps=run.ledger.steps if run.ledger else 0,
                identity=run.identity,
                config=self.config,
                weights=adapter_state_dict(model) if self.trained is None else parameters_by_name(model, self.trained),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                mechanism=run.mechanism_state(),
            )
            save_checkpoint(run.folder, state, run.ledger, keep=self.keep)

    @property
    def due(self) -> bool:
        """Whether a checkpoint belongs after the completed steps: every few, and after the last."""
        completed = self.run.completed
        return self.every > 0 and (completed % self.every == 0 or completed == self.run.last)


def saved_run(saved: TrainingState | None, folder: Path) -> SavedRun | None:
    """What the engine must know of a checkpoint."""
    if saved is None:
        return None
    copy = folder / f"checkpoint-{saved.step}" / LEDGER_NAME
    return SavedRun(saved.step, copy, saved.ledger_steps, saved.identity, saved.mechanism)


def restore(saved: TrainingState | None, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Put back what was saved, the same on every rank."""
    if saved is None:
        return
    weights = {name: value for name, value in saved.weights.items() if not name.endswith(".alpha")}
    if unexpected := model.load_state_dict(weights, strict=False).unexpected_keys:
        raise RuntimeError(f"what was saved is of another model: {unexpected[0]}")
    optimizer.load_state_dict(saved.optimizer)
    schedule.load_state_dict(saved.schedule)
