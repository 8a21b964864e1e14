"""Turns the flags of train_clm.py into the plan of a run, and describes data and memory before it starts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from dptune._validate import refuse
from dptune._words import counted
from dptune.accounting import planned_steps
from dptune.clipping_styles import FLAT, Clipping
from dptune.lora import adapters
from dptune.run.plan import RunPlan, expected_batch, make_plan
from dptune.run.plan_lines import describe_plan
from dptune.sampling import Parts
from dptune.shapes import Shapes
from dptune.units.unit import PrivacyUnit
from utils.data.tokenization import TokenizedDataset
from utils.models.memory import MemorySettings, NeedsWith, describe_memory, memory_needs
from utils.models.sizes import model_sizes
from utils.models.whole_memory import memory_of_whole, whole_sizes
from utils.training.optimization_arguments import OptimizationArguments
from utils.training.privacy_flags import PrivacyFlags


def num_sampled(unit: PrivacyUnit, train: TokenizedDataset) -> int:
    """The number of units that a step draws from: examples or authors."""
    if not unit.samples_authors:
        return len(train)
    if train.authors is None:
        raise RuntimeError("the data was loaded without the column of the privacy unit")
    return len(train.authors)


def plan_run(
    privacy: PrivacyFlags,
    optimization: OptimizationArguments,
    *,
    num_examples: int,
    world_size: int,
    clipping: Clipping = FLAT,
    parts: Parts | None = None,
    views: int = 1,
    trained: int = 1,
) -> RunPlan:
    """Steps and noise for `num_examples` examples (see `num_sampled`) on `world_size` processes.

    Args:
        parts: the parts whose examples are drawn more or less often.
        views: how many views of each row a step takes.
        trained: number of trained values.

    Raises:
        InvalidArgument: the batch exceeds the data set or what the weights of its parts allow, delta is 1/n or more,
            the target epsilon is out of reach, or the warm-up is as long as the run.
    """
    unit = replace(privacy.unit, views=views)
    batch = expected_batch(
        per_device=optimization.per_device_train_batch_size,
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        world_size=world_size,
        num_examples=num_examples,
        sampled=unit.sampled,
        parts=parts,
    )
    steps = optimization.max_train_steps or planned_steps(
        num_examples=num_examples, expected_batch_size=batch, epochs=optimization.num_train_epochs
    )
    if steps <= (warmup := optimization.num_warmup_steps):
        told = f"the run has {counted(steps, 'step')}, so its learning rate would never be reached; give fewer"
        refuse("--num_warmup_steps", warmup, told)
    return make_plan(
        privacy.settings(clipping, trained=trained),
        num_examples=num_examples,
        batch=batch,
        steps=steps,
        unit=unit,
        test_seed=privacy.insecure_test_seed,
        parts=parts,
        max_batch=privacy.max_batch,
    )


def describe_run(plan: RunPlan, privacy: PrivacyFlags) -> list[str]:
    """The plan as printed lines; of a clip norm that is still open they say how it is found."""
    is_open = "measured before training, on texts that the model writes" if privacy.clip_norm_is_open else None
    return describe_plan(plan, clip_norm=is_open)


def describe_clipping(plan: RunPlan, optimization: OptimizationArguments) -> list[str]:
    """A printed line about the clipping of a run without privacy; none for a private run, whose plan tells it."""
    if plan.privacy is not None:
        return []
    norm = optimization.max_grad_norm
    told = f"a step's gradient to norm {norm:g}" if norm else "none"
    return [f"gradient clipping      {told}"]


def describe_most_passes(
    plan: RunPlan, shapes: Shapes, *, ranks: int, rows_per_item: int = 1, virtual_tokens: int = 0
) -> list[str]:
    """A printed line: how many forward passes a step takes at most, where draws are cut; none where they are not.

    For the arguments see `Shapes.most_passes`.
    """
    if plan.max_batch is None:
        return []
    most = shapes.most_passes(plan.max_batch, ranks=ranks, rows_per_item=rows_per_item, virtual_tokens=virtual_tokens)
    return [f"forward passes         at most {most:,} per step on each process, as long as memory suffices"]


def describe_data(train: TokenizedDataset, held_out: TokenizedDataset | None) -> list[str]:
    """Printed lines about the data sets. Do not publish counts of the training set other than its size."""
    lines = [f"tokens                 {int(train.lengths.sum()):,} in the training data"]
    if train.authors is not None:
        authors = train.authors
        lines.append(f"authors                {len(authors):,} with {counted(len(train), 'example')}")
        lines.append(f"                       the largest author has {counted(authors.largest, 'row')}")
        if left_out := authors.num_left_out:
            lines.append(f"                       {counted(left_out, 'row')} left out because of --examples_per_unit")
    if train.num_cut:
        lines.append(f"                       {counted(train.num_cut, 'example')} cut to --block_size")
    if without := train.num_without_answer:
        told = "nothing to learn, for example because --block_size cuts their answer off"
        lines.append(f"                       {counted(without, 'example')} with {told}")
    if held_out is None:
        return [*lines, "held out               no validation data, so --eval_freq has no effect"]
    return [
        *lines,
        f"held out               {counted(len(held_out), 'example')}, {int(held_out.lengths.sum()):,} tokens",
    ]


def needs_of(model: nn.Module) -> NeedsWith | None:
    """What estimates the memory of training a model as it is prepared; None for one whose memory is not estimated.

    Args:
        model: a transformers model with its trained parameters; may be on the meta device.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        whole = whole_sizes(model)
        return None if whole is None else partial(memory_of_whole, whole)
    sizes = model_sizes(model) if any(adapters(model)) else None
    return None if sizes is None else partial(memory_needs, sizes)


def describe_model(model: nn.Module, settings: MemorySettings, available: int | None = None) -> list[str]:
    """Printed lines: the number of parameters and an estimate of the memory per device.

    Args:
        model: a transformers model with its trained parameters; may be on the meta device.
        settings: what memory depends on besides the model.
        available: bytes available on the device, if known (`utils.models.memory.device_memory`).
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"trainable parameters   {trained:,} of {every:,} ({trained / every:.3%})"]
    if (needs_with := needs_of(model)) is not None:
        return [*lines, *describe_memory(needs_with, settings, available)]
    if not any(adapters(model)):  # all weights, and for trained ones a gradient, two moments and the average
        least = 4 * (every + (3 + settings.keeps_average) * trained) / (settings.world_size if settings.sharded else 1)
        told = f"at least {least / (1 << 30):.1f} GiB in float32, without activations"
        if available is not None and least > available:
            told += f"; does not fit: the device has {available / (1 << 30):.1f} GiB"
        return [*lines, f"memory per device      {told}"]
    return [*lines, f"memory per device      not estimated: {type(model).__name__} has no list of decoder layers"]
