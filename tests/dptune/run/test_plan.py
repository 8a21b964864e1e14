"""The plan of a run: its noise keeps the target, its batch is the product of three, and repeats shorten it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.accounting import Spend, compose, epsilon
from dptune.accounting.rounding import rounded_up
from dptune.clipping_styles import PerLayer
from dptune.run.noise_ratios import noise_batch_ratio, noise_over_signal
from dptune.run.plan import RunPlan, expected_batch, last_step, make_plan, spends_to_come
from dptune.run.plan_lines import describe_plan
from dptune.run.settings import PrivacySettings
from dptune.sampling import Parts
from dptune.units.unit import ItemUnit, PrivacyUnit, Unit

DELTA = 1e-4


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


# --- weights ---

PARTS = Parts((60, 40), (1.0, 3.0))
SETTINGS = PrivacySettings(noise_multiplier=1.0, delta=DELTA)
RUN: dict[str, Any] = {"num_examples": 100, "batch": 12, "steps": 8}


def test_a_plan_with_weights_states_the_epsilon_of_the_largest_probability() -> None:
    plan = make_plan(SETTINGS, **RUN, parts=PARTS)
    assert plan.sampling_probability == pytest.approx(12 / 60)
    assert plan.privacy is not None
    assert plan.privacy.sampling_probability == plan.sampling_probability
    largest = epsilon(noise_multiplier=1.0, sampling_probability=12 / 60, steps=8, delta=DELTA)
    assert plan.privacy.planned_epsilon() == pytest.approx(largest)
    lines = describe_plan(plan)
    assert "sampling probability   0.2, the largest" in lines
    assert "weights                60 with weight 1, 40 with weight 3" in lines
    assert f"epsilon                {rounded_up(plan.privacy.planned_epsilon())} at delta 0.0001" in lines


def test_the_noise_for_a_target_covers_the_largest_probability() -> None:
    plan = make_plan(PrivacySettings(target_epsilon=3.0, delta=DELTA), **RUN, parts=PARTS)
    assert plan.privacy is not None
    assert plan.privacy.planned_epsilon() <= 3.0


def test_weights_without_privacy_are_planned_too() -> None:
    assert make_plan(None, **RUN, parts=PARTS).sampling_probability == pytest.approx(12 / 60)


@pytest.mark.parametrize("unit", [ItemUnit(group_size=2), PrivacyUnit("who", examples=2)])
def test_weights_are_refused_where_a_unit_has_several_rows(unit: Unit) -> None:
    for settings in (SETTINGS, None):
        with pytest.raises(InvalidArgument, match="the rows of one unit may lie in several parts"):
            make_plan(settings, **RUN, unit=unit, parts=PARTS)


def test_a_plan_whose_weights_are_not_the_mechanisms_is_refused() -> None:
    plan = make_plan(SETTINGS, **RUN, parts=PARTS)
    with pytest.raises(InvalidArgument, match=r"^parts="):
        dataclasses.replace(plan, parts=Parts((60, 40), (1.0, 4.0)))


def test_a_batch_that_the_weights_do_not_allow_is_refused() -> None:
    how: dict[str, Any] = {"per_device": 1, "world_size": 1, "num_examples": 100, "sampled": "examples", "parts": PARTS}
    assert expected_batch(gradient_accumulation_steps=60, **how) == 60
    told = "batch of 61, more than the 60 that these weights allow .a sampling probability above 1.; lower it, or give"
    with pytest.raises(InvalidArgument, match=f"^gradient_accumulation_steps=61: .*{told}"):
        expected_batch(gradient_accumulation_steps=61, **how)


# --- cut draws ---


def cut_plan(**changed: Any) -> RunPlan:
    settings = PrivacySettings(**{"noise_multiplier": 1.0, "delta": DELTA} | changed.pop("settings", {}))
    how: dict[str, Any] = {"num_examples": 100, "batch": 10, "steps": 8, "max_batch": 14}
    return make_plan(settings, **how | changed)


def test_a_plan_of_cut_draws_states_their_epsilon() -> None:
    plan = cut_plan()
    assert plan.privacy is not None
    assert plan.privacy.max_batch == plan.max_batch == 14
    assert "draws cut at           14 examples" in describe_plan(plan)
    assert plan.privacy.planned_epsilon() > 1.1 * cut_plan(max_batch=None).privacy.planned_epsilon()  # type: ignore[union-attr]
    with pytest.raises(InvalidArgument, match=r"^max_batch=15: the mechanism has 14"):
        dataclasses.replace(plan, max_batch=15)


def test_the_noise_for_a_target_and_the_last_step_cover_the_cut() -> None:
    plan = cut_plan(settings={"noise_multiplier": None, "target_epsilon": 3.0})
    assert plan.privacy is not None
    assert 2.97 < plan.privacy.planned_epsilon() <= 3
    assert last_step(plan, recorded=6, completed=4) == 6, "two repeated steps leave out the last two"


def test_authors_are_cut_as_units_and_groups_of_rows_are_refused() -> None:
    authors = PrivacyUnit("user", examples=4)
    plan = cut_plan(unit=authors)
    assert "draws cut at           14 authors" in describe_plan(plan)
    with pytest.raises(InvalidArgument, match=r"^max_batch=14: draws of units with up to 2 examples cannot be cut"):
        cut_plan(unit=ItemUnit(group_size=2))
    with pytest.raises(InvalidArgument, match=r"^max_batch=14: draws with weights cannot be cut"):
        cut_plan(parts=Parts((60, 40), (1.0, 2.0)))


def test_draws_are_cut_without_privacy_too() -> None:
    plan = make_plan(None, num_examples=100, batch=10, steps=8, max_batch=14)
    assert (plan.privacy, plan.max_batch) == (None, 14)
    with pytest.raises(InvalidArgument, match=r"^max_batch=9: "):
        make_plan(None, num_examples=100, batch=10, steps=8, max_batch=9)


# --- noise bands ---


def bands_plan(settings: dict[str, Any] | None = None, **changed: Any) -> RunPlan:
    given = PrivacySettings(**{"target_epsilon": 8.0, "delta": 1e-3, "noise_bands": 4} | (settings or {}))
    how: dict[str, Any] = {"num_examples": 400, "batch": 20, "steps": 30}
    return make_plan(given, **how | changed)


def test_a_plan_with_noise_bands_has_the_noise_for_its_turns_and_says_so() -> None:
    plan = bands_plan()
    assert plan.privacy is not None
    turns = Spend(plan.privacy.noise_multiplier, 4 * 0.05, 8)
    assert plan.privacy.spend(30) == turns
    assert spends_to_come(plan, 30) == [turns]
    assert 7.9 < compose([turns], delta=1e-3) == plan.privacy.planned_epsilon() <= 8
    told = next(line for line in describe_plan(plan) if line.startswith("noise bands            4: "))
    share = re.search(r"(\d+)% less noise in the sums over steps", told)
    assert share is not None
    one = bands_plan({"noise_bands": 1}).privacy
    assert one is not None
    noise = [each.noise_multiplier * each.bands.error(30) for each in (plan.privacy, one)]
    assert int(share[1]) == round(100 * (1 - noise[0] / noise[1])) >= 10
    assert noise_over_signal(plan.privacy, 100) / noise_over_signal(one, 100) == pytest.approx(noise[0] / noise[1])
    assert noise_batch_ratio(plan.privacy) / noise_batch_ratio(one) == pytest.approx(noise[0] / noise[1])
    assert not any("noise bands" in line for line in describe_plan(bands_plan({"noise_bands": 1})))


def test_automatic_noise_bands_are_those_with_the_least_noise() -> None:
    plan = bands_plan({"noise_bands": "auto"}, batch=100, steps=12)
    assert plan.privacy is not None
    every = [bands_plan({"noise_bands": bands}, batch=100, steps=12).privacy for bands in (1, 2, 4)]
    noise = [each.noise_multiplier * each.bands.error(12) for each in every if each is not None]
    assert plan.privacy == every[noise.index(min(noise))]
    assert plan.privacy.noise_bands > 1


def test_automatic_noise_bands_stay_below_a_limit() -> None:
    for most, bands in ((1, 1), (3, 2), (4, 4)):
        plan = bands_plan({"noise_bands": "auto", "most_noise_bands": most}, batch=20, steps=30)
        assert plan.privacy is not None
        assert plan.privacy.noise_bands == bands
    given = bands_plan({"noise_bands": 4, "most_noise_bands": 1}).privacy
    assert given is not None
    assert given.noise_bands == 4


def test_automatic_noise_bands_are_one_where_no_others_go() -> None:
    for how in ({"parts": Parts((200, 200), (1.0, 2.0)), "steps": 4}, {"batch": 400}):
        plan = bands_plan({"noise_bands": "auto"}, **how)
        assert plan.privacy is not None
        assert plan.privacy.noise_bands == 1


@pytest.mark.parametrize(
    ("settings", "how", "told"),
    [
        ({"noise_bands": 0}, {}, r"^noise_bands=0: "),
        ({"noise_bands": 31}, {"batch": 2}, r"^noise_bands=31: must be at most the number of steps, 30"),
        ({"noise_bands": 21}, {}, r"^noise_bands=21: rows would be drawn with probability 1.05 when"),
        ({"noise_bands": "auto", "target_epsilon": None, "noise_multiplier": 1.0}, {}, "is chosen for a target"),
        ({}, {"unit": ItemUnit(group_size=2)}, r"^noise_bands=4: units with up to 2 examples would have several turns"),
        ({}, {"parts": Parts((200, 200), (1.0, 2.0))}, r"^noise_bands=4: draws with weights cannot take turns"),
        ({}, {"max_batch": 60}, r"^noise_bands=4: draws that are cut cannot take turns"),
    ],
)
def test_noise_bands_whose_cost_is_not_known_are_refused(
    settings: dict[str, Any], how: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidArgument, match=told):
        bands_plan(settings, **how)


@pytest.mark.parametrize(("recorded", "completed", "last"), [(0, 0, 30), (4, 16, 30), (5, 17, 29), (8, 28, 28)])
def test_with_noise_bands_a_run_ends_when_its_turns_are_used_up(recorded: int, completed: int, last: int) -> None:
    """Of 8 turns: 17 steps use 5, and the 3 that are left are 12 steps."""
    assert last_step(bands_plan(), recorded, completed) == last
