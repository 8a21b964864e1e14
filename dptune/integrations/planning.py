"""What a run will be before it starts: how it samples, how long it lasts, its noise and its epsilon."""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from dptune._validate import refuse, require_delta
from dptune.accounting import noise_multiplier, planned_steps
from dptune.integrations.arguments import PrivacyArguments
from dptune.mechanism import PrivacyConfig
from dptune.sampling import METHOD_OF_EXAMPLES

PRIVACY_UNIT = "one training example (one item of the data set)"


@dataclass(frozen=True)
class ItemUnit:
    """What one item of a training set stands for, in the words of reports.

    Attributes:
        name: whose presence is hidden: all of it, or of theirs, is in this one item.
        sampled: items, in the plural.
        method: how an item enters a step.
    """

    name: str = PRIVACY_UNIT
    sampled: str = "examples"
    method: str = METHOD_OF_EXAMPLES

    @classmethod
    def of(cls, unit: str | ItemUnit) -> ItemUnit:
        """A unit, or its name alone."""
        return cls(unit) if isinstance(unit, str) else unit


@dataclass(frozen=True)
class TrainingPlan:
    """How a run samples and how long it lasts.

    Attributes:
        privacy: the mechanism; None where there is no privacy.
        num_examples: size of the training set.
        expected_batch_size: examples a step in expectation, over all processes.
        steps: logical steps.
    """

    privacy: PrivacyConfig | None
    num_examples: int
    expected_batch_size: int
    steps: int

    @property
    def sampling_probability(self) -> float:
        """Chance of one example to be in one step."""
        return self.expected_batch_size / self.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which an example is drawn once in expectation, rounded up."""
        return math.ceil(self.num_examples / self.expected_batch_size)


def count_examples(train_dataset: object) -> int:
    """Size of a data set that can be sampled from, refused where it has none."""
    if not isinstance(train_dataset, Sized) or not hasattr(train_dataset, "__getitem__"):
        refuse("train_dataset", type(train_dataset).__name__, "give a data set with a length and items by number")
    return len(train_dataset)


def logical_batch(args: Any, num_examples: int) -> int:
    """The expected batch size that transformers' flags stand for: per device x processes x accumulation steps."""
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = per_device * accumulation * args.world_size
    if batch > num_examples:
        refuse(
            "--gradient_accumulation_steps",
            accumulation,
            f"x {per_device} per device x {args.world_size} processes is a batch of {batch}, more than the "
            f"{num_examples} examples there are (sampling probability over 1); lower it",
        )
    return batch


def steps_of(args: Any, *, num_examples: int, batch: int) -> int:
    """`max_steps`, or as many as `num_train_epochs` need at this sampling probability, rounded up."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return planned_steps(num_examples=num_examples, expected_batch_size=batch, epochs=args.num_train_epochs)


def make_plan(privacy: PrivacyArguments, *, num_examples: int, batch: int, steps: int) -> TrainingPlan:
    """Find the noise and couple it to the sampling.

    Raises:
        InvalidArgument: a delta of 1/n or more, or a target epsilon out of reach.
    """
    if privacy.disable_dp:
        return TrainingPlan(None, num_examples, batch, steps)
    require_delta(privacy.target_delta, num_examples, name="--target_delta")
    sigma = privacy.noise_multiplier
    if sigma is None:
        assert privacy.target_epsilon is not None  # PrivacyArguments takes exactly one of the two
        sigma = noise_multiplier(
            target_epsilon=privacy.target_epsilon,
            delta=privacy.target_delta,
            sampling_probability=batch / num_examples,
            steps=steps,
        )
    config = PrivacyConfig(
        num_examples=num_examples,
        expected_batch_size=batch,
        steps=steps,
        clip_norm=privacy.per_sample_max_grad_norm,
        noise_multiplier=sigma,
        delta=privacy.target_delta,
    )
    return TrainingPlan(config, num_examples, batch, steps)


def describe_plan(plan: TrainingPlan, sampled: str = "examples") -> list[str]:
    """The plan in lines for a person; `sampled` is what there are `num_examples` of."""
    lines = [
        f"{sampled:<22} {plan.num_examples:,}",
        f"expected batch size    {plan.expected_batch_size:,}",
        f"sampling probability   {plan.sampling_probability:.6g}",
        f"steps                  {plan.steps:,}",
    ]
    if plan.privacy is None:
        return [*lines, "privacy                NONE: clipping and noise are turned off"]
    return [
        *lines,
        f"clip norm              {plan.privacy.clip_norm:g}",
        f"noise multiplier       {plan.privacy.noise_multiplier:g}",
        f"epsilon                {plan.privacy.planned_epsilon():.4f} at delta {plan.privacy.delta:g}",
    ]
