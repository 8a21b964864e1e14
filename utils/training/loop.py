"""The loop of every training script: draw, micro-batches, noise, update, log, save, until the end or a signal.

The task decides what is trained and how it is evaluated. `PrivateRun` decides everything that affects epsilon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from dptune.averaging import NO_AVERAGE, Averaging
from dptune.iterate_average import IterateAverage
from dptune.lora import trainable_parameters
from dptune.micro_batch import MicroBatchStats
from dptune.run.checkpoint import TrainingState
from dptune.run.session import GradientSync, PrivateRun
from dptune.units.batches import UnitDraw, rows_of
from utils.cli.interruption import StopRequest
from utils.training.best import resumed_best
from utils.training.log import RunLog, StepMetrics, Track, summarise
from utils.training.micro_batches import MicroBatches
from utils.training.optimizers import UpdateSettings, make_optimizer
from utils.training.resume import Checkpoints, restore
from utils.training.selection import NOTHING, HeldOutSelection
from utils.training.task import Task

AfterStep = Callable[[Any, int, float | None], None]  # (model, completed steps, epsilon so far)
AfterRelease = Callable[[], None]


@dataclass(frozen=True)
class End:
    """How training ended.

    Attributes:
        completed: steps that are part of the result.
        stopped_by: the signal that stopped it; None for a run that completed.
        released: the step whose weights are the result, if it is not the last.
        average: in words, what the result averages; None if it is the weights after one step.
    """

    completed: int
    stopped_by: str | None
    released: int | None = None
    average: str | None = None


@dataclass(frozen=True)
class Pace:
    """How gradients are summed and applied, and when the model is evaluated. Only a `selection` has a say in epsilon.

    Attributes:
        updates: the optimizer and its schedule.
        eval_freq: steps between evaluations.
        eval_at_start: whether to evaluate before the first step.
        gradient_sync: how gradients are added over ranks.
        loss_scale, keep_whole_sum: see `PrivateStep`.
        plain_max_grad_norm: maximum gradient norm of a step without privacy; None for no clipping.
        selection: what held-out rows decide.
        averaging: which average of the weights is evaluated, sampled from and released, instead of the last weights.
        after_step: called on every rank after each step and its evaluation, with the weights that would be released;
            must leave the generators alone.
        after_release: called on every rank between a step's release and its update; must leave the generators alone.
    """

    updates: UpdateSettings
    eval_freq: int
    eval_at_start: bool = True
    gradient_sync: GradientSync = "gather"
    loss_scale: float = 1.0
    keep_whole_sum: bool = False
    plain_max_grad_norm: float | None = None
    selection: HeldOutSelection = NOTHING
    averaging: Averaging = NO_AVERAGE
    after_step: AfterStep | None = None
    after_release: AfterRelease | None = None


@dataclass
class TrainingLoop:
    """One training run on this process.

    Attributes:
        run: draws, steps and the ledger.
        task: the model, its losses and its evaluation.
        micro_batches: the task's rows, dealt to this rank.
        checkpoints: where and how often they are saved.
        pace: optimizer, evaluation, clipping without privacy.
    """

    run: PrivateRun
    task: Task
    micro_batches: MicroBatches
    checkpoints: Checkpoints
    pace: Pace

    def train(self, saved: TrainingState | None, *, track: Track | None = None) -> tuple[End, list[dict[str, Any]]]:
        """Train from a checkpoint or from the start, until the last step that the budget allows or a stop request.

        Args:
            saved: the checkpoint to resume; None starts a new run.
            track: see `RunLog`.

        Returns:
            How training ended, and the rows of the diagnostics.
        """
        run = self.run
        is_main, start = run.ranks.is_main, run.completed
        with RunLog(run.folder, run.plan.steps, start_step=start, is_main=is_main, track=track) as log:
            return self._steps(log, saved), log.rows

    def _steps(self, log: RunLog, saved: TrainingState | None) -> End:
        run, model = self.run, self.task.model
        # Both are taken now: no parameter requires a gradient while the step records.
        parameters, average = trainable_parameters(model), IterateAverage(model, self.pace.averaging, run.plan.steps)
        run.prepare(
            model,
            gradient_sync=self.pace.gradient_sync,
            loss_scale=self.pace.loss_scale,
            keep_whole_sum=self.pace.keep_whole_sum,
        )
        optimizer, schedule = self._make_optimizer(parameters)
        restore(saved, model, optimizer, schedule, average)
        save = partial(self.checkpoints.save, model, optimizer, schedule, average=average)
        where = None if saved is None else run.folder / f"checkpoint-{saved.step}"
        best = run.ranks.from_main(lambda: resumed_best(self.pace.selection, where))
        model.train()  # for dropout; transformers also recomputes activations in training mode only
        with run, StopRequest(announce=run.ranks.is_main) as stop:
            if run.completed == 0:
                log.record(StepMetrics(step=0, **(self._evaluate() if self.pace.eval_at_start else {})))
                if self.checkpoints.every:
                    save()
            draws = run.draws(self.task.rows.authors)
            while run.completed < run.last and not best.is_over:
                began, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
                run.begin_step()
                draw = draws.draw()
                seen = self.micro_batches.run(draw, run, self.task.losses, stop)
                if seen is None:
                    save(more=best.files)
                    return End(run.completed, stop.name or "a signal")
                found = self._measured(draw, seen)
                self._update(parameters, optimizer, schedule)
                average.add(run.completed)
                found |= {"seconds": time.perf_counter() - began, "learning_rate": rate, "epsilon": run.epsilon}
                if run.completed % self.pace.eval_freq == 0 or run.completed == run.last:
                    with average.in_model():
                        found |= self._evaluate()
                        best.see(run.completed, self._shared(found.get("eval_loss")), parameters)
                log.record(StepMetrics(step=run.completed, **found))
                if self.pace.after_step is not None:
                    with average.in_model():
                        self.pace.after_step(model, run.completed, run.epsilon)
                if self.checkpoints.due or (best.is_over and self.checkpoints.every):
                    save(more=best.files)
            average.put_in()
            released = best.put_back(parameters)
            return End(run.completed, None, released, average.in_words(released or run.completed))

    def _shared(self, loss: float | None) -> float | None:
        """The held-out loss as rank 0 measured it, so that what follows from it is the same on every rank."""
        return self.run.ranks.from_main(lambda: loss) if self.pace.selection.decides else None

    def _evaluate(self) -> dict[str, Any]:
        """The task's measurements; the model is back in training mode afterwards."""
        self.task.model.eval()
        found = self.task.evaluate(self.micro_batches)
        self.task.model.train()
        return found

    def _make_optimizer(self, parameters: Sequence[nn.Parameter]) -> tuple[Optimizer, LambdaLR]:
        updates, names, steps = self.pace.updates, set(self.task.head), self.run.plan.steps
        head = [parameter for name, parameter in self.task.model.named_parameters() if name in names]
        optimizer = make_optimizer(updates, parameters, self.run.gradient_noise_std, head)
        return optimizer, get_scheduler(
            updates.lr_scheduler_type, optimizer, updates.warmup_steps(steps), num_training_steps=steps
        )

    def _update(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer, schedule: LambdaLR) -> None:
        self.run.finish_step()
        if self.pace.after_release is not None:
            self.pace.after_release()
        if self.pace.plain_max_grad_norm is not None:
            if self.run.plan.privacy is not None:
                raise RuntimeError(
                    "plain_max_grad_norm is for steps without privacy: a private gradient is clipped already"
                )
            nn.utils.clip_grad_norm_(parameters, self.pace.plain_max_grad_norm)
        optimizer.step()
        schedule.step()

    def _measured(self, draw: UnitDraw, seen: list[MicroBatchStats]) -> dict[str, Any]:
        """What all ranks measured in the current step. NOT private."""
        gathered = self.micro_batches.gathered
        losses, norms, clipped = (
            gathered(getattr(stats, name) for stats in seen) for name in ("losses", "norms", "clipped")
        )
        found = summarise(losses, norms, clipped, self.run.clip_norm)
        tokens = self.micro_batches.shapes.views * int(self.task.rows.lengths[rows_of(draw)].sum())
        return found | {"batch_drawn": len(draw), "tokens": tokens}


def describe_stop(end: End, steps: int, folder: Path) -> str:
    """The line printed about a run that was stopped."""
    return (
        f"{end.stopped_by}: stopped after step {end.completed} of {steps}, saved in {folder}; "
        "resume with --resume_from_checkpoint latest"
    )


def describe_selection(end: End, last: int) -> list[str]:
    """Printed lines: what a run of `last` steps releases, if it is not the weights after the last of them."""
    early = f"after step {end.completed:,} of {last:,}: the held-out loss no longer fell"
    return [
        *([f"stopped early          {early}"] if end.completed < last else []),
        *([f"weights of             step {end.released:,}, with the lowest held-out loss"] if end.released else []),
        *([f"released weights       {end.average}"] if end.average else []),
    ]
