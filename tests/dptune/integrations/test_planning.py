"""From transformers' arguments to a plan: what is counted, and the flag that a refusal names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from dptune import InvalidArgument, accounting
from dptune.clipping_styles import Automatic
from dptune.integrations.planning import count_examples, logical_batch, plan_training, steps_of, unit_of
from dptune.units.unit import ItemUnit
from tests.dptune.integrations.runs import privacy_arguments


def arguments(**changed: Any) -> Any:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "world_size": 2}
    return SimpleNamespace(**(settings | {"max_steps": -1, "num_train_epochs": 3.0} | changed))


def test_a_data_set_must_have_a_length_and_items() -> None:
    assert count_examples([1, 2, 3]) == 3
    for other in (iter([1]), {1, 2}):
        with pytest.raises(InvalidArgument, match=r"^train_dataset='\w+': give a data set with a length"):
            count_examples(other)


PEOPLE = {"list of rows": [{"input_ids": [1], "User_ID": 3}], "table": datasets.Dataset.from_dict({"email": ["a"]})}


@pytest.mark.parametrize("name", PEOPLE)
def test_items_that_name_people_need_a_unit(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^train_dataset: names users in (User_ID|email); give privacy_unit="):
        unit_of(None, PEOPLE[name])
    assert unit_of("one row", PEOPLE[name]) == ItemUnit("one row")
    assert unit_of(ItemUnit(), PEOPLE[name]) == ItemUnit()


@pytest.mark.parametrize("rows", [[{"input_ids": [1]}], [], [[1, 2]], [{3: 4}], datasets.Dataset.from_dict({"a": [1]})])
def test_any_other_item_is_a_unit(rows: Any) -> None:
    assert unit_of(None, rows) == ItemUnit()


def test_the_batch_is_over_processes_and_accumulation() -> None:
    assert logical_batch(arguments(), 12) == 12
    with pytest.raises(InvalidArgument, match=r"^--gradient_accumulation_steps=3: .*a batch of 12, more than the 11"):
        logical_batch(arguments(), 11)


def test_steps_are_given_or_cover_the_epochs() -> None:
    assert steps_of(arguments(max_steps=7), num_examples=100, batch=12) == 7
    assert steps_of(arguments(), num_examples=100, batch=12) == 25
    assert steps_of(arguments(num_train_epochs=0.01), num_examples=100, batch=12) == 1


def test_the_plan_has_all_that_decides_epsilon() -> None:
    unit, how = ItemUnit(group_size=2), {"num_examples": 100, "batch": 10, "steps": 5}
    privacy = privacy_arguments(target_epsilon=4.0)
    plan = plan_training(privacy, **how, unit=unit, clipping=Automatic())
    assert plan.privacy is not None
    assert (plan.privacy.group_size, plan.privacy.clipping, plan.privacy.clip_norm) == (2, Automatic(), 0.5)
    assert (plan.unit, plan.target_epsilon, plan.test_seed) == (unit, 4.0, 10)
    sigma = plan.privacy.noise_multiplier
    spent = accounting.epsilon(
        noise_multiplier=sigma, sampling_probability=0.1, steps=5, delta=1e-3, group_size=2
    )  # fmt: skip
    assert 3.99 < spent <= 4.0
    assert plan_training(privacy_arguments(disable_dp=True), **how, unit=unit).privacy is None
    with pytest.raises(InvalidArgument, match=r"^clipping=Automatic.*: is not read with --disable_dp"):
        plan_training(privacy_arguments(disable_dp=True), **how, unit=unit, clipping=Automatic())


def test_a_refusal_names_the_flag() -> None:
    with pytest.raises(InvalidArgument, match=r"^--delta=0\.001: .*below 1/num_examples"):
        plan_training(privacy_arguments(), num_examples=1000, batch=10, steps=5, unit=ItemUnit())
