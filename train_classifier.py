r"""Fine-tune a sentence classifier, privately or not, in one of nine ways (`--finetune_mode`).

    python train_classifier.py --datasets sst2 --finetune_mode full
    python train_classifier.py --datasets qnli qqp --finetune_mode ia3 \
        --enable_dp --target_epsilon 8.0 --max_grad_norm 0.1

Or behind torchrun or accelerate launch, on several processes. Each task gets a folder, a model and a privacy budget of
its own. `--dry_run` prints what a run would cost and stops.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import get_scheduler

from dptune import GaussianNoise, Ledger, trainable_parameters
from dptune.checkpoint import TrainingState
from dptune.dropout import draw_new_masks
from dptune.identity import refuse_other_run
from dptune.integrations.peft import class_logits
from dptune.ranks import require_equal
from utils.arguments import exit_on_invalid_argument, parse, public_config
from utils.classification import ClassificationLoss, predict
from utils.classification_data import ClassificationTask, describe_task
from utils.classification_metrics import scores
from utils.classifier_arguments import GROUPS, Settings
from utils.classifier_files import load_classifier_tokenizer
from utils.classifier_outputs import SCORES_NAME, finish_classifier
from utils.classifier_setup import describe_setup, dtype_of_launch, load_tasks, load_trained, plan_task
from utils.folder_lock import FolderLock
from utils.interruption import StopRequest
from utils.launch import make_accelerator
from utils.micro_batches import MicroBatches, remembered_budget
from utils.optimizers import make_optimizer
from utils.randomness import make_sampler
from utils.resume import Checkpoints, find_saved_run, last_step, model_identity, restore, run_identity
from utils.run_log import RunLog, StepMetrics
from utils.run_outputs import refuse_existing_run, start_run
from utils.run_plan import RunPlan, describe_plan
from utils.steps import make_step, measured, running_epsilon
from utils.trainable import in_autocast

_RANKS_CHECKED_EVERY = 10  # steps


@exit_on_invalid_argument()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train on one task after another."""
    settings = Settings(*parse(*GROUPS, args=argv, description=__doc__))
    accelerator = make_accelerator()
    run_tasks(settings, accelerator)
    accelerator.end_training()


def run_tasks(settings: Settings, accelerator: Accelerator) -> None:
    """Load and plan all tasks, so that a mistake in the last one is found before the first is trained; then train."""
    dtype = dtype_of_launch(accelerator)
    tokenizer = load_classifier_tokenizer(settings.checkpoint.model_checkpoint)
    planned = [(task, plan_task(task, settings)) for task in load_tasks(settings, tokenizer)]
    for task, plan in planned:
        if settings.results.resume_from_checkpoint is None and accelerator.is_main_process:
            refuse_existing_run(str(settings.folder / task.name))
        accelerator.print(*describe_task(task), *describe_plan(plan), *describe_setup(settings), sep="\n")
    for task, plan in planned:
        folder = settings.folder / task.name
        if settings.results.dry_run:
            load_trained(task, plan, settings, tokenizer, accelerator)
        elif broadcast_object_list([(folder / SCORES_NAME).exists()])[0]:
            accelerator.print(f"finished already       {folder}")
        else:
            with FolderLock(enabled=accelerator.is_main_process) as lock:
                if not train_task(task, plan, settings, tokenizer, accelerator, dtype, lock):
                    return


def train_task(
    task: ClassificationTask,
    plan: RunPlan,
    settings: Settings,
    tokenizer: Any,
    accelerator: Accelerator,
    dtype: torch.dtype,
    lock: FolderLock,
) -> bool:
    """Train and write one task; whether it ended by itself."""
    folder, output = settings.folder / task.name, settings.results.of_task(settings.folder / task.name)
    lock.take(folder)
    saved = find_saved_run(output, accelerator)
    identity = {"run": run_identity(plan, task.train, settings.budget.engine, settings.steps.optimizer)}
    if saved is not None:
        refuse_other_run(saved.identity["run"], identity["run"])
    model, names = load_trained(task, plan, settings, tokenizer, accelerator)
    identity["model"] = model_identity(model)
    if saved is not None and accelerator.is_main_process:
        refuse_other_run(saved.identity["model"], identity["model"])
    config = public_config(*settings) | {"task": task.name, "num_processes": accelerator.num_processes}
    ledger = start_run(folder, config, private=plan.privacy is not None, is_main=accelerator.is_main_process)
    lock.take(folder)
    token_budget = broadcast_object_list([remembered_budget(folder, settings.token_budget)])[0]
    how: dict[str, Any] = {"virtual_tokens": settings.virtual_tokens, "length_flag": "--max_length"}
    micro_batches = MicroBatches(task.train, token_budget, tokenizer.pad_token_id, accelerator, **how)
    kept: dict[str, Any] = {"every": output.checkpointing_steps, "keep": output.save_total_limit, "trained": names}
    checkpoints = Checkpoints(folder, ledger, identity, config, accelerator=accelerator, **kept)
    run = Run(accelerator, task, model, dtype, plan, settings, ledger, micro_batches, checkpoints)
    start = saved.step if saved else 0
    last = broadcast_object_list([last_step(plan, ledger, settings.budget.engine.target_epsilon, start)])[0]
    with RunLog(folder, plan.steps, start_step=start, is_main=accelerator.is_main_process) as log:
        end = run.steps(log, saved, last=last)
    return conclude(end, folder, tokenizer, run, log)


def conclude(end: End, folder: Path, tokenizer: Any, run: Run, log: RunLog) -> bool:
    """Write what a run leaves, if it ended by itself; whether it did."""
    if end.stopped_by is not None:
        run.accelerator.print(
            f"{end.stopped_by}: stopped after step {end.completed} of {run.plan.steps}, saved in {folder}; "
            "go on with --resume_from_checkpoint latest"
        )
        return False
    if run.accelerator.is_main_process:
        facts: dict[str, Any] = {"completed": end.completed, "noise": end.noise, "diagnostics": log.rows}
        finish_classifier(folder, run.model, tokenizer, run.task, run.plan, run.settings, run.ledger, **facts)
    run.accelerator.wait_for_everyone()
    return True


@dataclass(frozen=True)
class End:
    """How training ended: after which step, by which signal (None: by itself), and where its noise came from."""

    completed: int
    stopped_by: str | None
    noise: GaussianNoise | None


@dataclass
class Run:
    """Training on one task, on this process."""

    accelerator: Accelerator
    task: ClassificationTask
    model: Any
    dtype: torch.dtype  # of the forward pass; weights are in float32
    plan: RunPlan
    settings: Settings
    ledger: Ledger | None  # on the main process of a private run
    micro_batches: MicroBatches
    checkpoints: Checkpoints

    def __post_init__(self) -> None:
        self.losses = in_autocast(ClassificationLoss(self.model), self.dtype, self.accelerator.device)
        self.classify = in_autocast(partial(class_logits, self.model), self.dtype, self.accelerator.device)

    def steps(self, log: RunLog, saved: TrainingState | None, *, last: int) -> End:
        """Train from what was saved until after step `last`, or until asked to stop."""
        parameters, settings = trainable_parameters(self.model), self.settings
        seed = settings.budget.insecure_test_seed
        start = saved.step if saved else 0
        own_step = make_step(self.model, self.plan, self.ledger, self.accelerator, test_seed=seed, completed=start)
        optimizer = make_optimizer(
            settings.steps.optimizer,
            parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.steps.weight_decay,
            momentum=0.0,
            noise_std=own_step.gradient_noise_std,
        )
        schedule = get_scheduler(settings.steps.lr_scheduler_type, optimizer, 0, num_training_steps=self.plan.steps)
        completed = restore(saved, self.model, optimizer, schedule, own_step)
        sampler = make_sampler(self.plan, self.accelerator, test_seed=seed, completed=completed)
        eval_freq = settings.results.eval_freq or max(1, round(1 / self.plan.sampling_probability))
        with own_step as step, StopRequest(announce=self.accelerator.is_main_process) as stop:
            save = partial(self.checkpoints.save, model=self.model, optimizer=optimizer, schedule=schedule, step=step)
            if completed == 0:
                log.record(StepMetrics(step=0, **self._evaluate()))
                if self.checkpoints.every:
                    save(0)
            self.model.train()  # dropout, from masks that are drawn afresh
            for number in range(completed + 1, last + 1):
                began = time.perf_counter()
                if number % _RANKS_CHECKED_EVERY == 1:
                    require_equal(parameters, self.accelerator.gather)
                draw = sampler.draw()
                draw_new_masks(self.accelerator.process_index, number, test_seed=seed)
                seen = self.micro_batches.run(draw, step, self.losses, stop)
                if seen is None:
                    save(completed)
                    break
                step.finish()
                if settings.budget.plain_max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, settings.budget.plain_max_grad_norm)
                learning_rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                schedule.step()
                completed = number
                seconds = time.perf_counter() - began
                evaluate = completed % eval_freq == 0 or completed == last
                found = self._evaluate() if evaluate else {}
                found |= measured(self.micro_batches, self.plan, draw, seen)
                epsilon = running_epsilon(self.plan, self.ledger)
                log.record(
                    StepMetrics(step=completed, seconds=seconds, learning_rate=learning_rate, epsilon=epsilon, **found)
                )
                if self.checkpoints.due(completed, last):
                    save(completed)
            stopped_by = (stop.name or "a signal") if completed < last else None
            return End(completed, stopped_by, step.noise)

    def _evaluate(self) -> dict[str, Any]:
        """Loss and scores on the validation splits; nothing where there are none."""
        found, total, rows = {}, 0.0, 0
        was_training = self.model.training
        self.model.eval()
        for split, data in self.task.validation.items():
            classes, loss = predict(
                self.classify,
                data,
                token_budget=self.micro_batches.token_budget,
                pad_token_id=self.micro_batches.pad_token_id,
                device=self.accelerator.device,
                gather=self.accelerator.gather,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                virtual_tokens=self.micro_batches.virtual_tokens,
            )
            found[split] = scores(data.labels, classes, self.task.metrics)
            total, rows = total + loss * len(data), rows + len(data)
        self.model.train(was_training)
        return {"eval_loss": total / rows, "scores": found} if rows else {}


if __name__ == "__main__":
    main()
