"""The plan of a task: its batch, its clip norm, and what a validation split may decide."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.run.identity import num_trained
from tests.classifier_settings import settings
from utils.classification import budget_arguments
from utils.classification import plan as module
from utils.classification.model import load_in_mode
from utils.classification.plan import describe_setup


def test_the_logical_batch_is_the_flags_on_any_number_of_processes(planned: Any) -> None:
    plan = planned(num_train_epochs=3)[0].plan
    assert (plan.num_examples, plan.expected_batch_size, plan.steps) == (120, 24, 15)
    with pytest.raises(InvalidArgument, match=r"^--batch_size=121: sst2 has 120 training examples"):
        planned(batch_size=121)


def test_an_open_clip_norm_is_measured_once_for_plan_and_settings(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([2.5])
    monkeypatch.setattr(module, "measure_clip_norm", lambda _: next(measured))
    one = planned(clip_norm=None)[0]
    assert one.plan.privacy.clip_norm == one.settings.budget.clip_norm == 2.5


def test_a_target_epsilon_gets_noise_bands_and_their_optimizer_with_room_for_what_is_trained(
    planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"noise_multiplier": None, "target_epsilon": 8, "batch_size": 12, "num_train_epochs": 2}
    one, tokenizer, _ = planned(**given)
    assert one.plan.noise_bands > 1
    assert (one.settings.steps.optimizer, one.settings.budget.noise_bands) == ("lowpass-adam", "auto")
    assert load_in_mode(one.task, one.settings, tokenizer, one.plan.privacy).updates.optimizer == "lowpass-adam"
    asked: list[int] = []
    monkeypatch.setattr(budget_arguments, "bands_within", lambda values: asked.append(values) or 1)
    other, tokenizer, _ = planned(**given)
    assert other.plan.noise_bands == 1
    assert other.settings.steps.optimizer == "adamw"
    assert asked == [num_trained(load_in_mode(other.task, other.settings, tokenizer, other.plan.privacy).model)]


@pytest.mark.parametrize("bands", ["1", "2"])
def test_bands_and_optimizer_that_are_given_stay(planned: Any, bands: str) -> None:
    given = {"noise_multiplier": None, "target_epsilon": 8, "batch_size": 12, "num_train_epochs": 2}
    one = planned(**given, noise_bands=bands, optimizer="dp-adam")[0]
    assert one.plan.noise_bands == int(bands)
    assert one.settings.steps.optimizer == "dp-adam"


def test_a_given_noise_and_a_run_without_privacy_have_independent_noise_and_adamw(planned: Any) -> None:
    one = planned()[0]
    assert (one.plan.noise_bands, one.settings.steps.optimizer) == (1, "adamw")
    plain = planned(enable_dp=None, noise_multiplier=None, delta=None)[0]
    assert (plain.plan.privacy, plain.settings.steps.optimizer) == (None, "adamw")
    assert plain.settings.budget.noise_bands is None


def test_the_mode_and_the_default_optimizer_are_told(planned: Any) -> None:
    given = settings("--finetune_mode", "lora")
    assert describe_setup(given, planned()[0]) == ["fine-tuning mode       lora"]
    private = settings("--enable_dp", "--clip_norm", "1", "--noise_multiplier", "1")
    assert describe_setup(private, planned()[0])[1:] == ["optimizer              adamw (default without noise bands)"]
    chosen = settings("--enable_dp", "--clip_norm", "1", "--optimizer", "sgd", "--learning_rate", "1")
    assert len(describe_setup(chosen, planned()[0])) == 1
