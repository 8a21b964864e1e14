"""The plan of a run: its noise keeps the target, its batch is the product of three, and repeats shorten it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.accounting import epsilon
from dptune.accounting.meaning import factor, log_odds
from dptune.clipping_styles import PerLayer
from dptune.run.plan import (
    PrivacySettings,
    RunPlan,
    describe_needed_data,
    describe_plan,
    expected_batch,
    last_step,
    make_plan,
)
from dptune.units.unit import ItemUnit

DELTA = 1e-4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"noise_multiplier": None}, "noise_multiplier=None"),
        ({"target_epsilon": 3.0}, "target_epsilon=3.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": None, "target_epsilon": 0.0}, "target_epsilon=0.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{named}: "):
        PrivacySettings(**({"noise_multiplier": 1.0, "delta": DELTA} | changed))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_examples": 1000}, "num_examples=1000"),
        ({"expected_batch_size": 100}, "expected_batch_size=100"),
        ({"steps": 9}, "steps=9"),
        ({"unit": ItemUnit(group_size=2)}, "group_size=2"),
    ],
)
def test_a_plan_that_contradicts_its_mechanism_is_refused(changed: dict[str, Any], named: str) -> None:
    """The plan makes the draws and names the unit, but the mechanism is what epsilon is computed from."""
    plan = make_plan(
        PrivacySettings(noise_multiplier=1.0, delta=DELTA), num_examples=100, batch=10, steps=8, unit=ItemUnit()
    )
    with pytest.raises(InvalidArgument, match=f"^{named}: the mechanism has "):
        dataclasses.replace(plan, **changed)


@pytest.fixture(scope="module", params=[1, 2])
def budget(request: pytest.FixtureRequest) -> RunPlan:
    """A run of 8 steps that uses up an epsilon of 3, for one example or for two of each unit."""
    settings = PrivacySettings(target_epsilon=3.0, delta=DELTA)
    return make_plan(settings, num_examples=100, batch=10, steps=8, unit=ItemUnit(group_size=request.param))


def spent(plan: RunPlan, steps: int) -> float:
    assert plan.privacy is not None
    sigma, group_size = plan.privacy.noise_multiplier, plan.unit.group_size
    return epsilon(noise_multiplier=sigma, sampling_probability=0.1, steps=steps, delta=DELTA, group_size=group_size)


def test_the_noise_is_the_least_that_keeps_the_target_for_the_whole_group(budget: RunPlan) -> None:
    assert budget.privacy is not None
    assert budget.privacy.group_size == budget.unit.group_size
    assert 2.99 < spent(budget, 8) == budget.privacy.planned_epsilon() <= 3.0


def test_layers_with_clip_norms_of_their_own_decide_the_whole_ones() -> None:
    settings = PrivacySettings(noise_multiplier=1.0, delta=DELTA, clipping=PerLayer({"a": 3.0, "b": 4.0}))
    plan = make_plan(settings, num_examples=100, batch=10, steps=8)
    assert plan.privacy is not None
    assert plan.privacy.clip_norm == 5.0


def test_a_delta_that_lets_one_examples_data_be_published_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^delta=0\.01: .*below 1/num_examples"):
        make_plan(PrivacySettings(noise_multiplier=1.0, delta=0.01), num_examples=100, batch=10, steps=8)


def test_a_plan_without_privacy_samples_alike() -> None:
    plan = make_plan(None, num_examples=95, batch=10, steps=8, test_seed=4)
    assert (plan.privacy, plan.target_epsilon, plan.test_seed) == (None, None, 4)
    assert (plan.sampling_probability, plan.steps_per_epoch) == (10 / 95, 10)
    assert describe_plan(plan)[-1].endswith("NONE: clipping and noise are turned off")


def test_the_description_has_the_epsilon_rounded_up(budget: RunPlan) -> None:
    words = describe_plan(budget)[-2].split()
    assert spent(budget, 8) <= float(words[1]) < spent(budget, 8) + 1e-4
    assert words[2:] == ["at", "delta", "0.0001"]


def test_the_description_says_which_epsilon_it_is_as_the_card_does(budget: RunPlan) -> None:
    odds = factor(log_odds(spent(budget, 8), DELTA))
    told = f"reasonable: an attacker's guess is right at most {odds} times for each time that it is wrong"
    assert describe_plan(budget)[-1].startswith(f"which epsilon is that  {told}")


def test_needed_data_are_those_of_the_plan(budget: RunPlan) -> None:
    """With the target among the epsilons, and the noise of the plan up to what a rough search adds."""
    assert budget.privacy is not None
    _, head, *rows, needed, _ = describe_needed_data(dataclasses.replace(budget, target_epsilon=4.0))
    assert head.split()[1:] == ["epsilon", "1", "epsilon", "3", "epsilon", "4", "epsilon", "8"]
    (own,) = [row.split() for row in rows if row.split()[0] == "100"]
    assert budget.privacy.noise_multiplier <= float(own[2]) < 1.1 * budget.privacy.noise_multiplier
    assert needed.startswith("examples for noise 1")
    assert describe_needed_data(make_plan(None, num_examples=95, batch=10, steps=8)) == []


@pytest.mark.parametrize(("noise", "shown"), [(0.01, "5"), (1e-200, "inf")])
def test_noise_that_protects_nobody_is_said_before_training(noise: float, shown: str) -> None:
    settings = PrivacySettings(noise_multiplier=noise, delta=DELTA)
    *_, epsilon_line, last = describe_plan(make_plan(settings, num_examples=100, batch=10, steps=1))
    assert epsilon_line.split()[1].startswith(shown)
    words = "epsilon is above 50: this protects nobody; use it only to see whether training works"
    assert last == f"too little noise       {words}"


def test_a_batch_is_per_device_times_processes_times_accumulation() -> None:
    shape = {"per_device": 3, "gradient_accumulation_steps": 4, "world_size": 2, "sampled": "authors"}
    assert expected_batch(**shape, num_examples=24) == 24
    with pytest.raises(InvalidArgument, match=r"^gradient_accumulation_steps=4: .*a batch of 24, .*the 23 authors"):
        expected_batch(**shape, num_examples=23)


# --- a resumed run ---


@pytest.mark.parametrize(
    ("completed", "released", "last"),
    [
        (0, 0, 8),
        (5, 5, 8),
        (8, 8, 8),
        (4, 6, 6),  # two steps are run again: two of the planned ones are not
        (0, 3, 5),
        (7, 8, 7),
        (2, 20, 2),  # nothing is left, and nothing is undone
    ],
)
def test_repeated_steps_are_taken_off_the_end_of_a_run_with_a_budget(
    completed: int, released: int, last: int, budget: RunPlan
) -> None:
    found = last_step(budget, released, completed)
    assert found == last
    if released <= 8:
        assert spent(budget, released + found - completed) <= 3.0
    if found < 8:
        assert spent(budget, released + found - completed + 1) > 3.0


def test_without_a_budget_every_planned_step_is_run(budget: RunPlan) -> None:
    assert last_step(dataclasses.replace(budget, target_epsilon=None), 6, 4) == 8
    assert last_step(dataclasses.replace(budget, privacy=None), 6, 4) == 8
