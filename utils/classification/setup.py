"""From the flags of train_classifier.py to what a run is made of: tasks, plans, and a model of which a part trains."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed

from dptune._validate import refuse
from dptune.accounting import planned_steps
from utils.classification.arguments import Settings
from utils.classification.files import load_classifier
from utils.classification.losses import check_classifier_rules
from utils.classification.measured_defaults import measure_clip_norm, measure_head_rate, typical_gradient_norm
from utils.classification.modes import head_modules, prepare_mode
from utils.classification.tasks import ClassificationTask, load_file_task, load_task
from utils.cli.launch import compute_dtype, sharding_of_launch
from utils.models.loading import require_context
from utils.training.optimizers import UpdateSettings
from utils.training.plan import RunPlan, plan_steps
from utils.training.resume import fingerprint, run_identity

_SHORT = 0.5  # of a typical gradient's length: full mode at a third of it went the way of the commonest class


def load_tasks(settings: Settings, tokenizer: Any) -> list[ClassificationTask]:
    """The tasks of --datasets, or the one of --train_file, tokenised.

    Raises:
        InvalidArgument: data that are not there or cannot be read, or one checkpoint to resume several tasks from.
    """
    data, resume = settings.data, settings.results.resume_from_checkpoint
    how: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_length": settings.checkpoint.max_length,
        "max_train_examples": data.max_train_examples,
        "seed": settings.steps.seed,
    }
    if data.train_file is not None:
        assert data.text_columns is not None  # TaskArguments
        how |= {"text_columns": data.text_columns, "label_column": data.labels_in}
        how |= {"class_names": data.class_names}
        return [load_file_task(data.train_file, data.validation_file, **how)]
    assert data.datasets is not None  # TaskArguments
    if resume not in (None, "latest") and len(data.datasets) > 1:
        refuse("--resume_from_checkpoint", resume, "is of one task; give latest, or that task alone in --datasets")
    return [load_task(name, data_dir=data.data_dir, **how) for name in data.datasets]


class PlannedTask(NamedTuple):
    """A task, the settings with what was left open for it, and steps and noise."""

    task: ClassificationTask
    settings: Settings
    plan: RunPlan


def plan_task(task: ClassificationTask, settings: Settings, tokenizer: Any, accelerator: Accelerator) -> PlannedTask:
    """Plan one task; every rank calls it. The logical batch is the same on any number of processes.

    Raises:
        InvalidArgument: a batch larger than the data set, a delta of 1/n or more, a target epsilon out of reach, or a
            clip norm to measure on a model that cannot be loaded.
    """
    batch, examples = settings.steps.batch_size, len(task.train)
    if batch > examples:
        refuse("--batch_size", batch, f"{task.name} has {examples} training examples; give at most that")
    steps = planned_steps(num_examples=examples, expected_batch_size=batch, epochs=settings.steps.epochs)
    if settings.budget.clip_norm_is_open:
        model = load_in_mode(task, settings, tokenizer).model.to(accelerator.device)
        (clip_norm,) = broadcast_object_list([measure_clip_norm(model)])
        settings = settings._replace(budget=replace(settings.budget, max_grad_norm=clip_norm))
    plan = plan_steps(settings.budget.engine, num_examples=examples, batch=batch, steps=steps)
    return PlannedTask(task, settings, plan)


def describe_setup(settings: Settings) -> list[str]:
    """The mode in a line for a person, whether the clip norm is measured, and a warning where privacy was meant and is
    not there. `settings` as the user gave them."""
    lines = [f"fine-tuning mode       {settings.mode.finetune_mode}"]
    if settings.budget.clip_norm_is_open:
        lines.append("--max_grad_norm        measured (just above a typical gradient at the start, on random tokens)")
    return lines if settings.budget.warning is None else [*lines, settings.budget.warning]


def describe_rates(updates: UpdateSettings, *, chosen: bool) -> str:
    """The peak rates in a line for a person; `chosen` is whether the user gave the first."""
    given = "" if chosen else " (the default of this mode)"
    same = updates.head_learning_rate == updates.learning_rate
    head = "" if same else f", {updates.head_learning_rate:g} for the head"
    return f"learning rate          {updates.learning_rate:g}{given}{head}"


def describe_short_clip_norm(clip_norm: float, typical: float) -> list[str]:
    """A warning where private training would hardly learn: see `measured_defaults.measure_clip_norm`."""
    if not clip_norm < _SHORT * typical:
        return []
    return [
        f"warning: clip norm {clip_norm:g} is far below a typical gradient at the start, {typical:.2g} long: every "
        "example then pulls equally hard, and the commonest class may win; without --max_grad_norm it is measured"
    ]


def dtype_of_launch(accelerator: Accelerator) -> torch.dtype:
    """What forward passes compute in.

    Raises:
        InvalidArgument: a launch that is not for classifiers.
    """
    if sharding_of_launch() is not None:
        refuse("distributed_type", "FSDP", "classifiers are not sharded; take accelerate_config_nofsdp.cfg or torchrun")
    dtype = compute_dtype(accelerator.mixed_precision, accelerator.device)
    if dtype == torch.float16:
        refuse("mixed_precision", "fp16", "float16 overflows where whole models train; set it to bf16 or no")
    return dtype


def run_identity_of(task: ClassificationTask, plan: RunPlan, settings: Settings) -> dict[str, Any]:
    """What a resumed run must share and is known before the model is; see `utils.training.resume.run_identity`."""
    # The mode comes first: a measured clip norm follows it, and would be named in its place.
    run = run_identity(plan, task.train, settings.budget.engine, settings.steps.optimizer)
    return vars(settings.mode) | run


class Trained(NamedTuple):
    """A model in its mode, the names of what is trained, and how; and a fingerprint of the checkpoint's own weights."""

    model: Any
    names: list[str]
    updates: UpdateSettings
    checkpoint: str

    def identity(self, plan: RunPlan, settings: Settings) -> dict[str, Any]:
        """What decides where the weights begin and how they move, as JSON values: what a resumed run must share beside
        the mechanism and the data. Numbers of processes and sizes of micro-batches are not in it."""
        return asdict(self.updates) | {
            "max_grad_norm": settings.budget.plain_max_grad_norm,
            "steps": plan.steps,
            "seed": settings.steps.seed,
            "max_length": settings.checkpoint.max_length,
            "checkpoint": self.checkpoint,
        }


def load_trained(
    task: ClassificationTask, plan: RunPlan, settings: Settings, tokenizer: Any, accelerator: Accelerator
) -> Trained:
    """A fresh model in its mode on this rank's device, equal on every rank. Before a private run the engine's gradients
    of it are compared with autograd's.

    Raises:
        InvalidArgument: no such model, a mode that does not fit it, a text longer than its context, or gradients that
            the engine does not know.
    """
    trained = load_in_mode(task, settings, tokenizer)
    model = trained.model
    every = sum(parameter.numel() for parameter in model.parameters())
    some = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    accelerator.print(f"trainable parameters   {some:,} of {every:,} ({some / every:.3%})")
    accelerator.print(describe_rates(trained.updates, chosen=settings.steps.learning_rate is not None))
    model.to(accelerator.device).eval()
    if plan.privacy is not None:
        kinds = {"num_classes": len(task.class_names), "pad_token_id": tokenizer.pad_token_id}
        for line in describe_short_clip_norm(plan.privacy.clip_norm, typical_gradient_norm(model)):
            accelerator.print(line)
        check_classifier_rules(model, token_types=task.train.token_types is not None, **kinds)
    return trained


def load_in_mode(task: ClassificationTask, settings: Settings, tokenizer: Any) -> Trained:
    """The same, as it is loaded: on the CPU, and no gradient compared."""
    set_seed(settings.steps.seed)  # the start of what is new
    name, mode = settings.checkpoint.model_checkpoint, settings.mode
    model, new = load_classifier(name, task.class_names, pad_token_id=tokenizer.pad_token_id)
    longest, virtual = settings.checkpoint.max_length, settings.virtual_tokens
    require_context(model, longest, flag="--max_length", virtual_tokens=virtual)
    updates = settings.updates(partial(measure_head_rate, model))
    fresh = tuple(f"{module}." for module in [*head_modules(model), *new])
    checkpoint = fingerprint(named for named in model.named_parameters() if not named[0].startswith(fresh))
    flags = vars(mode) | {"also_trained": new}
    model, names = prepare_mode(model, flags.pop("finetune_mode"), **flags)
    return Trained(model, names, updates, checkpoint)
