"""The plan of a task: its batch, its clip norm, and what a validation split may decide."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from utils.classification import plan as module
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


def test_the_mode_is_told(planned: Any) -> None:
    assert describe_setup(planned()[0].settings) == ["fine-tuning mode       lora"]
