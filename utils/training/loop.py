"""The loop of every training script: draw, micro-batches, noise, update, log, save, until the end or a signal.

What a script trains on and how it is judged comes from outside, as losses and as `evaluate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import get_scheduler

from dptune import GaussianNoise, Ledger, PlainStep, PrivateStep, trainable_parameters
from dptune.dropout import draw_new_masks
from dptune.ranks import require_equal
from dptune.run.checkpoint import TrainingState
from dptune.step import MicroBatchStats, released_size
from dptune.units.batches import Draw, rows_of
from utils.cli.interruption import StopRequest
from utils.training.log import RunLog, StepMetrics, summarise
from utils.training.micro_batches import Losses, MicroBatches
from utils.training.optimizers import UpdateSettings, make_optimizer
from utils.training.plan import RunPlan
from utils.training.randomness import make_noise, make_sampler
from utils.training.resume import Checkpoints, last_step, restore

_RANKS_CHECKED_EVERY = 10  # steps

AnyStep = PrivateStep | PlainStep


@dataclass(frozen=True)
class End:
    """How training ended: after which step, by which signal (None: by itself), and where its noise came from."""

    completed: int
    stopped_by: str | None
    noise: GaussianNoise | None


@dataclass
class TrainingLoop:
    """One training run on this process.

    Attributes:
        accelerator: the ranks.
        model: its trainable parameters are trained.
        losses: one a row, of what `micro_batches` gives.
        plan: how it samples, how long it lasts, and the mechanism of a private run.
        ledger: of a private run, on the main process.
        micro_batches: the training set.
        checkpoints: where they go, and how often.
        evaluate: fields of `StepMetrics` about held-out data, the same on all ranks; called in training mode and
            leaves it so.
        updates: the optimizer and its schedule.
        eval_freq: steps between evaluations.
        target_epsilon: of the plan's noise; None where the noise was given.
        test_seed: see `utils.training.randomness.make_noise`.
        gradient_sync: gather or reduce.
        loss_scale: see `PrivateStep`.
        plain_max_grad_norm: clips the gradient of a step without privacy.
        eval_at_start: whether to evaluate before the first step.
        head: names of the parameters that train at `updates.head_learning_rate`.
    """

    accelerator: Accelerator
    model: nn.Module
    losses: Losses
    plan: RunPlan
    ledger: Ledger | None
    micro_batches: MicroBatches
    checkpoints: Checkpoints
    evaluate: Callable[[], dict[str, Any]]
    updates: UpdateSettings
    eval_freq: int
    target_epsilon: float | None
    test_seed: int | None
    gradient_sync: str = "gather"
    loss_scale: float = 1.0
    plain_max_grad_norm: float | None = None
    head: Collection[str] = ()
    eval_at_start: bool = True

    def run(self, saved: TrainingState | None, **tracking: Any) -> tuple[End, list[dict[str, Any]]]:
        """Train from what was saved until the last step that the budget allows, or until asked to stop.

        Args:
            saved: what a checkpoint held; None begins.
            tracking: see `RunLog`.

        Returns:
            How it ended, and the rows of the diagnostics.
        """
        start, is_main = saved.step if saved else 0, self.accelerator.is_main_process
        last = broadcast_object_list([last_step(self.plan, self.ledger, self.target_epsilon, start)])[0]
        folder = self.checkpoints.folder
        with RunLog(folder, self.plan.steps, start_step=start, is_main=is_main, **tracking) as log:
            return self._steps(log, saved, last), log.rows

    def _steps(self, log: RunLog, saved: TrainingState | None, last: int) -> End:
        parameters = trainable_parameters(self.model)  # none of them asks for a gradient while the step records
        own_step = self._make_step(saved.step if saved else 0)
        head = [parameter for name, parameter in self.model.named_parameters() if name in self.head]
        optimizer = make_optimizer(self.updates, parameters, own_step.gradient_noise_std, head)
        schedule = get_scheduler(
            self.updates.lr_scheduler_type,
            optimizer,
            self.updates.num_warmup_steps,
            num_training_steps=self.plan.steps,
        )
        completed = restore(saved, self.model, optimizer, schedule, own_step)
        self.model.train()  # dropout; and transformers recomputes activations in training mode only
        with own_step as step, StopRequest(announce=self.accelerator.is_main_process) as stop:
            save = partial(self.checkpoints.save, model=self.model, optimizer=optimizer, schedule=schedule, step=step)
            if completed == 0:
                log.record(StepMetrics(step=0, **(self.evaluate() if self.eval_at_start else {})))
                if self.checkpoints.every:
                    save(0)
            for number, draw in self._draws(parameters, completed, last):
                began, rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
                seen = self.micro_batches.run(draw, step, self.losses, stop)
                if seen is None:
                    save(completed)
                    break
                self._update(parameters, step, optimizer, schedule)
                completed = number
                found = self._measured(draw, seen) | {"seconds": time.perf_counter() - began, "learning_rate": rate}
                if completed % self.eval_freq == 0 or completed == last:
                    found |= self.evaluate()
                log.record(StepMetrics(step=completed, epsilon=self._running_epsilon(), **found))
                if self.checkpoints.due(completed, last):
                    save(completed)
            stopped_by = (stop.name or "a signal") if completed < last else None
            return End(completed, stopped_by, step.noise)

    def _draws(self, parameters: list[nn.Parameter], completed: int, last: int) -> Iterator[tuple[int, Draw]]:
        """(number of the step, its draw), the same on every rank; before each one dropout's masks become fresh ones."""
        data, rank = self.micro_batches.data, self.accelerator.process_index
        sampler = make_sampler(self.plan, self.accelerator, data.authors, test_seed=self.test_seed, completed=completed)
        for number in range(completed + 1, last + 1):
            if number % _RANKS_CHECKED_EVERY == 1:
                require_equal(parameters, self.accelerator.gather)
            draw_new_masks(rank, number, test_seed=self.test_seed)
            yield number, sampler.draw()

    def _update(
        self, parameters: list[nn.Parameter], step: AnyStep, optimizer: torch.optim.Optimizer, schedule: Any
    ) -> None:
        step.finish()
        if self.plain_max_grad_norm is not None:
            assert self.plan.privacy is None, "a private gradient is not clipped again"
            nn.utils.clip_grad_norm_(parameters, self.plain_max_grad_norm)
        optimizer.step()
        schedule.step()

    def _make_step(self, completed: int) -> AnyStep:
        how = {"gather": self.accelerator.gather, "reduce": self.accelerator.reduce}
        ranks: dict[str, Any] = {self.gradient_sync: how[self.gradient_sync]}
        ranks |= {"world_size": self.accelerator.num_processes, "loss_scale": self.loss_scale}
        if self.plan.privacy is None:
            return PlainStep(self.model, self.plan.expected_batch_size, **ranks)
        rank = self.accelerator.process_index
        size = released_size(self.model, self.plan.privacy)
        noise = make_noise(size, rank, test_seed=self.test_seed, completed=completed)
        return PrivateStep(self.model, self.plan.privacy, ledger=self.ledger, noise=noise, rank=rank, **ranks)

    def _measured(self, draw: Draw, seen: list[MicroBatchStats]) -> dict[str, Any]:
        """What all ranks saw in one step. NOT private."""
        gathered = self.micro_batches.gathered
        clip_norm = self.plan.privacy.clip_norm if self.plan.privacy else None
        summary = summarise(
            gathered([stats.losses for stats in seen]), gathered([stats.norms for stats in seen]), clip_norm
        )
        return summary | {"batch_drawn": len(draw), "tokens": int(self.micro_batches.data.lengths[rows_of(draw)].sum())}

    def _running_epsilon(self) -> float | None:
        return self.ledger.running_epsilon(self.plan.privacy.delta) if self.ledger and self.plan.privacy else None


def describe_stop(end: End, steps: int, folder: Any) -> str:
    """A run that was stopped, in a line for a person."""
    return (
        f"{end.stopped_by}: stopped after step {end.completed} of {steps}, saved in {folder}; "
        "go on with --resume_from_checkpoint latest"
    )
