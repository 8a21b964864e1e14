"""The plan of train_classifier.py for each task: steps and noise, label words, a measured clip norm, and shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dptune._validate import refuse
from dptune.accounting import planned_steps
from dptune.devices import computes_apart
from dptune.pass_overhead import pass_overhead
from dptune.run.identity import num_trained
from dptune.run.plan import RunPlan, make_plan
from dptune.shapes import Shapes
from dptune.units.unit import PrivacyUnit
from utils.classification.arguments import Settings
from utils.classification.budget_arguments import BudgetArguments
from utils.classification.data import head_of
from utils.classification.measured_defaults import measure_clip_norm
from utils.classification.model import load_in_mode
from utils.classification.tasks import ClassificationTask
from utils.training.chosen_defaults import default_optimizer, describe_optimizer
from utils.training.optimizers import require_works
from utils.training.plan import describe_most_passes


class PlannedTask(NamedTuple):
    """A task, its settings with its label words and measured defaults filled in, and its plan of steps and noise."""

    task: ClassificationTask
    settings: Settings
    plan: RunPlan


def plan_task(task: ClassificationTask, settings: Settings, tokenizer: Any, accelerator: Accelerator) -> PlannedTask:
    """Plan one task; every rank calls it. The logical batch does not depend on the number of processes.

    Raises:
        InvalidArgument: a batch larger than the data set, a delta of 1/n or more, a target epsilon out of reach, label
            words that do not fit the classes, or a model that cannot be loaded to measure the clip norm.
    """
    settings = settings._replace(head=head_of(task.name, settings))
    settings.head.require_one_each(task.class_names, task.name)
    batch, examples = settings.steps.batch_size, len(task.train)
    if batch > examples:
        refuse("--batch_size", batch, f"{task.name} has {examples} training examples; give at most that")
    steps = planned_steps(num_examples=examples, expected_batch_size=batch, epochs=settings.steps.num_train_epochs)
    require_works(settings.steps.optimizer, accelerator.device, sharded=False)
    output = settings.results.of_task(settings.folder)
    output.require_selection(private=settings.budget.enable_dp, has_validation=bool(task.validation))
    trained = 0
    if settings.budget.enable_dp:
        model = load_in_mode(task, _with_optimizer(settings, 1), tokenizer, None).model.to(accelerator.device)
        trained = num_trained(model)
        settings = settings._replace(budget=_known(settings.budget, model))
    plan = make_plan(
        settings.budget.settings(trained),
        num_examples=examples,
        batch=batch,
        steps=steps,
        unit=PrivacyUnit(views=settings.views.views),
        test_seed=settings.budget.insecure_test_seed,
        max_batch=settings.budget.max_batch,
    )
    return PlannedTask(task, _with_optimizer(settings, plan.noise_bands), plan)


def _known(budget: BudgetArguments, model: Any) -> BudgetArguments:
    """The flags, with the noise bands and the clip norm that were left open; the norm is measured on this model."""
    clip_norm = budget.clip_norm
    if budget.clip_norm_is_open:
        (clip_norm,) = broadcast_object_list([measure_clip_norm(model)])
    return replace(budget, clip_norm=clip_norm, noise_bands=budget.bands)


def _with_optimizer(settings: Settings, noise_bands: int) -> Settings:
    """The flags, with the optimizer if it was left open."""
    optimizer = settings.steps.optimizer or default_optimizer(noise_bands)
    return settings._replace(steps=replace(settings.steps, optimizer=optimizer))


def describe_setup(settings: Settings, planned: PlannedTask) -> list[str]:
    """Printable lines: the mode, and what was chosen for `planned` where the flags left it open."""
    lines = [f"fine-tuning mode       {settings.mode.finetune_mode}"]
    if settings.budget.enable_dp:
        lines += describe_optimizer(settings.steps.optimizer, planned.settings.steps.optimizer)
    if settings.budget.clip_norm_is_open:
        lines.append("--clip_norm            measured, just above a typical gradient at the start, on random tokens")
    return lines


def shapes_of(settings: Settings, plan: RunPlan, accelerator: Accelerator, token_budget: int) -> Shapes:
    """The shapes of a task's micro-batches of at most so many tokens."""
    return Shapes(
        settings.checkpoint.block_size,
        token_budget,
        plan.expected_batch_size / accelerator.num_processes,
        overhead=pass_overhead(accelerator=computes_apart(accelerator.device)),
        views=settings.views.views,
    )


def describe_passes(planned: PlannedTask, accelerator: Accelerator) -> list[str]:
    """A printable line if draws are cut: how many forward passes a step takes at most."""
    settings, plan = planned.settings, planned.plan
    return describe_most_passes(
        plan,
        shapes_of(settings, plan, accelerator, settings.token_budget),
        ranks=accelerator.num_processes,
        virtual_tokens=settings.virtual_tokens,
    )
