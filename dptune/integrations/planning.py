"""From transformers' arguments to the plan of a private run."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING

import numpy as np

from dptune._validate import HIDDEN, refuse, renamed, require_count
from dptune.accounting import planned_steps
from dptune.clipping_styles import FLAT, Clipping
from dptune.integrations.privacy_arguments import FLAGS, NOT_READ, PrivacyArguments
from dptune.run.plan import RunPlan, expected_batch, make_plan
from dptune.units.columns import names_users
from dptune.units.unit import ItemUnit, Unit

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from dptune.integrations.draws import Examples


def count_examples(train_dataset: object) -> int:
    """Number of examples of a training set.

    Raises:
        InvalidArgument: it has no length or no items by number, so it cannot be sampled from.
    """
    if not isinstance(train_dataset, Sized) or not hasattr(train_dataset, "__getitem__"):
        refuse("train_dataset", type(train_dataset).__name__, "give a data set with a length and items by number")
    return len(train_dataset)


def unit_of(privacy_unit: str | Unit | None, train_dataset: Examples | None) -> Unit:
    """What an item is: what the user says, or by default a unit by itself.

    Raises:
        InvalidArgument: the user says nothing, and a column of the training set or a key of its first item names users.
    """
    if privacy_unit is not None:
        return ItemUnit.of(privacy_unit)
    first = train_dataset[0] if train_dataset is not None and len(train_dataset) else None
    keys = [key for key in first if isinstance(key, str)] if isinstance(first, Mapping) else []
    for name in [*(getattr(train_dataset, "column_names", None) or []), *keys]:
        if names_users(name):
            remedy = "give privacy_unit=ItemUnit() (dptune.units.unit) to protect single items, or make users the items"
            refuse("train_dataset", HIDDEN, f"names users in {' '.join(name.split())}; {remedy}")
    return ItemUnit()


def rows_of_each(rows_per_unit: int | np.ndarray, num_examples: int) -> np.ndarray:
    """Rows of each item, int64 [num_examples].

    Raises:
        InvalidArgument: a number below 1, or not one for each item.
    """
    if isinstance(rows_per_unit, int):
        require_count("rows_per_unit", rows_per_unit)
        return np.full(num_examples, rows_per_unit, dtype=np.int64)
    if rows_per_unit.shape != (num_examples,) or (num_examples and rows_per_unit.min() < 1):
        shape = rows_per_unit.shape
        refuse("rows_per_unit", shape, f"give one number of at least 1 for each of the {num_examples} items")
    return rows_per_unit.astype(np.int64)


def logical_batch(args: TrainingArguments, num_examples: int) -> int:
    """The expected batch size of transformers' flags: per device x processes x accumulation steps.

    Raises:
        InvalidArgument: it is larger than the number of examples.
    """
    with renamed(FLAGS):
        return expected_batch(
            per_device=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            world_size=args.world_size,
            num_examples=num_examples,
            sampled="examples",
        )


def steps_of(args: TrainingArguments, *, num_examples: int, batch: int) -> int:
    """`max_steps` if it is set; otherwise the steps of `num_train_epochs` at this sampling probability, rounded up."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return planned_steps(num_examples=num_examples, expected_batch_size=batch, epochs=args.num_train_epochs)


def plan_training(
    privacy: PrivacyArguments, *, num_examples: int, batch: int, steps: int, unit: Unit, clipping: Clipping = FLAT
) -> RunPlan:
    """Find the noise and make the plan; `batch` is the expected batch size.

    Raises:
        InvalidArgument: a delta of 1/n or more, a target epsilon that no useful noise reaches, or a clipping style with
            `disable_dp`.
    """
    if privacy.disable_dp and clipping != FLAT:
        refuse("clipping", clipping, NOT_READ)
    with renamed(FLAGS):
        return make_plan(
            privacy.settings(clipping),
            num_examples=num_examples,
            batch=batch,
            steps=steps,
            unit=unit,
            test_seed=privacy.insecure_test_seed,
            max_batch=privacy.max_batch,
        )
