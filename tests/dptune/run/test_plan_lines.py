"""What the user reads of a plan: the reason for delta, noise that protects nobody, noise that drowns everything."""

from __future__ import annotations

import pytest

from dptune.run.plan import make_plan
from dptune.run.plan_lines import describe_noise, describe_plan
from dptune.run.settings import PrivacySettings

DELTA = 1e-4


def test_without_a_delta_it_is_the_default_one_and_its_reason_is_told() -> None:
    run = {"num_examples": 2000, "batch": 10, "steps": 8}
    plan = make_plan(PrivacySettings(target_epsilon=3.0), **run)
    assert plan.privacy is not None
    assert plan.privacy.delta == 1e-5
    assert plan.privacy.planned_epsilon() <= 3.0
    reason = "delta 1e-05: a tenth of 1 / 2,000 examples, rounded down to a power of ten"
    assert reason in [line.strip() for line in describe_plan(plan)]
    given = make_plan(PrivacySettings(target_epsilon=3.0, delta=1e-5), **run)
    assert given.privacy == plan.privacy
    assert reason not in "".join(describe_plan(given))


@pytest.mark.parametrize(("noise", "shown"), [(0.01, "5"), (1e-200, "inf")])
def test_noise_that_protects_nobody_is_said_before_training(noise: float, shown: str) -> None:
    settings = PrivacySettings(noise_multiplier=noise, delta=DELTA)
    *_, epsilon_line, last = describe_plan(make_plan(settings, num_examples=100, batch=10, steps=1))
    assert epsilon_line.split()[1].startswith(shown)
    words = "epsilon is above 50: this protects nobody; use it only to see whether training works"
    assert last == f"too little noise       {words}"


@pytest.mark.parametrize(
    ("epsilon", "trained", "warned"), [(8.0, 115_200, False), (0.001, 115_200, True), (0.1, 9, False)]
)
def test_noise_in_which_nothing_can_be_learned_is_said(epsilon: float, trained: int, warned: bool) -> None:
    """The first case is the first run of the README, which learns."""
    plan = make_plan(PrivacySettings(target_epsilon=epsilon, delta=1e-4), num_examples=2000, batch=64, steps=15)
    lines = describe_noise(plan, trained)
    assert bool(lines) == warned
    assert all("give a larger epsilon, more examples, or train fewer parameters" in line for line in lines)
    assert describe_noise(make_plan(None, num_examples=2000, batch=64, steps=15), trained) == []


@pytest.mark.parametrize(("bands", "trained", "told"), [(1, 10**9, []), (4, 10**6, []), (4, 10**8, ["3.0"])])
def test_the_memory_of_noise_bands_is_told_if_it_is_much(bands: int, trained: int, told: list[str]) -> None:
    settings = PrivacySettings(target_epsilon=8.0, delta=1e-4, noise_bands=bands)
    lines = describe_noise(make_plan(settings, num_examples=2000, batch=64, steps=15), trained)
    assert [line.split()[3] for line in lines if line.startswith("noise bands take")] == told
