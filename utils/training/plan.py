"""What a run will be before it starts: batch, steps, noise and epsilon from the flags, and an estimate of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dptune._validate import refuse, require_delta
from dptune.accounting import noise_multiplier, planned_steps
from dptune.accounting.rounding import rounded_up
from dptune.clipping import FLAT, Clipping, PerLayer, clipping_in_words
from dptune.lora import adapters
from dptune.mechanism import PrivacyConfig
from dptune.units.unit import PrivacyUnit
from utils.data.tokenization import TokenizedDataset
from utils.models.memory import MemorySettings, describe_memory
from utils.models.sizes import model_sizes
from utils.training.arguments import OptimizationArguments, PrivacyArguments

_ROW = PrivacyUnit()


@dataclass(frozen=True)
class RunPlan:
    """How a run samples and how long it lasts.

    Attributes:
        privacy: the mechanism; None where there is no privacy.
        num_examples: size of the training set, in what is sampled: rows, or authors.
        expected_batch_size: of them a step in expectation, over all processes.
        steps: logical steps.
        unit: whose presence is hidden, and how; known without privacy too.
    """

    privacy: PrivacyConfig | None
    num_examples: int
    expected_batch_size: float
    steps: int
    unit: PrivacyUnit = _ROW

    @property
    def sampling_probability(self) -> float:
        """Chance of one of them to be in one step."""
        return self.expected_batch_size / self.num_examples


def num_sampled(unit: PrivacyUnit, train: TokenizedDataset) -> int:
    """How many there are of what a step draws."""
    if not unit.samples_authors:
        return len(train)
    assert train.authors is not None, "the data were loaded without the column of the privacy unit"
    return len(train.authors)


def plan_run(
    privacy: PrivacyArguments,
    optimization: OptimizationArguments,
    *,
    num_examples: int,
    world_size: int,
    clipping: Clipping = FLAT,
) -> RunPlan:
    """Steps and noise for a data set of `num_examples` on `world_size` processes; see `RunPlan` and `num_sampled`.

    Raises:
        InvalidArgument: a batch larger than the data set, a delta of 1/n or more, a target epsilon out of reach.
    """
    per_device, accumulation = optimization.per_device_train_batch_size, optimization.gradient_accumulation_steps
    batch, unit = world_size * per_device * accumulation, privacy.unit
    if batch > num_examples:
        refuse(
            "--gradient_accumulation_steps",
            accumulation,
            f"x {per_device} per device x {world_size} processes is a batch of {batch}, more than the {num_examples} "
            f"{unit.sampled} there are (sampling probability over 1); lower it",
        )
    steps = optimization.max_train_steps or planned_steps(
        num_examples=num_examples, expected_batch_size=batch, epochs=optimization.num_train_epochs
    )
    return plan_steps(privacy, num_examples=num_examples, batch=batch, steps=steps, clipping=clipping)


def plan_steps(
    privacy: PrivacyArguments, *, num_examples: int, batch: int, steps: int, clipping: Clipping = FLAT
) -> RunPlan:
    """Noise for so many steps of so large a batch in expectation, over all processes; see `RunPlan`.

    Raises:
        InvalidArgument: a delta of 1/n or more, a target epsilon out of reach.
    """
    unit = privacy.unit
    if not privacy.private:
        return RunPlan(None, num_examples, batch, steps, unit)
    require_delta(privacy.delta, num_examples, name="--delta")
    if privacy.target_epsilon is not None:
        sigma = noise_multiplier(
            target_epsilon=privacy.target_epsilon,
            delta=privacy.delta,
            sampling_probability=batch / num_examples,
            steps=steps,
            group_size=unit.group_size,
        )
    else:
        assert privacy.noise_multiplier is not None  # PrivacyArguments takes exactly one of the two
        sigma = privacy.noise_multiplier
    total = clipping.total if isinstance(clipping, PerLayer) else None
    clip_norm = privacy.clip_norm if total is None else total
    config = PrivacyConfig(
        num_examples=num_examples,
        expected_batch_size=batch,
        steps=steps,
        clip_norm=clip_norm,
        noise_multiplier=sigma,
        delta=privacy.delta,
        group_size=unit.group_size,
        clipping=clipping,
    )
    return RunPlan(config, num_examples, batch, steps, unit)


def describe_plan(plan: RunPlan) -> list[str]:
    """The plan in lines for a person."""
    lines = [
        f"{plan.unit.sampled:<22} {plan.num_examples:,}",
        f"expected batch size    {plan.expected_batch_size:,}{' authors' if plan.unit.samples_authors else ''}",
        f"sampling probability   {plan.sampling_probability:.6g}",
        f"steps                  {plan.steps:,}",
    ]
    if plan.privacy is None:
        return [*lines, "privacy                NONE: clipping and noise are turned off"]
    if plan.unit.column is not None:
        lines += [f"privacy unit           {plan.unit.name}", f"method                 {plan.unit.how}"]
    return [
        *lines,
        f"clip norm              {plan.privacy.clip_norm:g}",
        *(
            []
            if plan.privacy.clipping == FLAT
            else [f"clipping               {clipping_in_words(plan.privacy.clipping)}"]
        ),
        f"noise multiplier       {plan.privacy.noise_multiplier:g}",
        f"epsilon                {rounded_up(plan.privacy.planned_epsilon())} at delta {plan.privacy.delta:g}",
    ]


def describe_data(train: TokenizedDataset, held_out: TokenizedDataset | None) -> list[str]:
    """The data sets in lines for a person. Counts of the training set other than its size are not for publishing."""
    lines = [f"tokens                 {int(train.lengths.sum()):,} in training"]
    if train.authors is not None:
        authors = train.authors
        lines.append(f"authors                {len(authors):,} of {len(train):,} examples")
        lines.append(f"                       {authors.largest:,} rows are of the largest")
        if authors.num_left_out:
            lines.append(f"                       {authors.num_left_out:,} rows are left out: --examples_per_unit")
    if train.num_cut:
        lines.append(f"                       {train.num_cut:,} examples are cut to --block_size")
    if train.num_without_answer:
        lines.append(
            f"                       {train.num_without_answer:,} examples have no answer token: zero gradients"
        )
    if held_out is None:
        return [*lines, "held out               nothing: no validation data, so --eval_freq has no effect"]
    return [*lines, f"held out               {len(held_out):,} examples, {int(held_out.lengths.sum()):,} tokens"]


def describe_model(
    model: Any,
    token_budget: int,
    dtype: torch.dtype,
    *,
    checkpointing: bool,
    block_size: int | None = None,
    available: int | None = None,
    **settings: Any,
) -> list[str]:
    """Parameters and an estimate of memory a device, in lines for a person.

    Args:
        model: a transformers model with its adapters; may be on the meta device.
        token_budget: padded tokens in one forward pass.
        dtype: of the base model.
        checkpointing: whether activations are recomputed.
        block_size: tokens of the longest example; None for as many as the budget.
        available: bytes of the device, if they are known (`utils.models.memory.device_memory`).
        settings: the rest of `utils.models.memory.MemorySettings`: world_size, sharded, offload, bits, lengths.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"trainable parameters   {trained:,} of {every:,} ({trained / every:.3%})"]
    if not any(adapters(model)):  # weights, gradient, two moments
        least = 4 * (every + 3 * trained) / (1 << 30)
        return [*lines, f"memory a device        at least {least:.1f} GiB in float32, activations not estimated"]
    sizes = model_sizes(model)
    if sizes is None:
        return [*lines, f"memory a device        not estimated: {type(model).__name__} has no list of decoder layers"]
    needed = MemorySettings(dtype, token_budget, block_size or token_budget, checkpointing, **settings)
    return [*lines, *describe_memory(sizes, needed, available)]
