"""Flags that changed while a run was stopped: refused, or recorded with the first step that ran with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.run.checkpoint import TrainingState
from utils.classification import arguments as classification
from utils.training import arguments as causal_lm
from utils.training.changes import OnResume, OnResumeTable, describe_changes, resumed_config, without_unused

TABLE = {
    "fixed": OnResume.REFUSED,
    "data": OnResume.COMPARED,
    "rate": OnResume.EFFECTIVE,
    "decay": OnResume.EFFECTIVE,
    "size": OnResume.RUNTIME,
}
BEGAN = {"fixed": [1, 2], "data": "a", "rate": 0.1, "decay": 0.0, "size": 4, "processes": 1}


def saved(step: int = 6, **changed: Any) -> TrainingState:
    return TrainingState(
        step=step, ledger_steps=0, identity={}, config=BEGAN | changed, weights={}, optimizer={}, schedule={}
    )


@pytest.mark.parametrize(
    ("table", "groups"),
    [
        (causal_lm.ON_RESUME, causal_lm.CAUSAL_LM_GROUPS),
        (classification.ON_RESUME, classification.CLASSIFIER_GROUPS),
    ],
)
def test_every_flag_has_a_class(table: OnResumeTable, groups: tuple[type, ...]) -> None:
    assert table.keys() == {one.name for group in groups for one in dataclasses.fields(group)}


def test_a_new_run_records_its_settings() -> None:
    assert resumed_config(BEGAN, None, TABLE) == BEGAN
    assert describe_changes(BEGAN, None) == []


def test_a_resumed_run_with_the_same_settings_has_no_history() -> None:
    assert resumed_config(BEGAN | {"fixed": (1, 2)}, saved(), TABLE) == BEGAN | {"fixed": (1, 2)}


def test_what_is_fixed_is_refused_with_both_values() -> None:
    with pytest.raises(InvalidArgument, match="fixed was '1 2' in the checkpoint and is '1 3' now"):
        resumed_config(BEGAN | {"fixed": [1, 3]}, saved(), TABLE)


def test_what_takes_effect_is_recorded_and_what_does_not_matter_is_as_it_is_now() -> None:
    now = BEGAN | {"rate": 0.2, "data": "b", "size": 8, "processes": 2}
    config = resumed_config(now, saved(), TABLE)
    assert config == now | {"rate": 0.1, "changes": [{"from_step": 7, "rate": 0.2}]}
    assert describe_changes(config, saved()) == ["changed                rate from 0.1 to 0.2, from step 7"]


def test_a_second_change_is_compared_with_the_first() -> None:
    history = [{"from_step": 3, "rate": 0.2}]
    before = saved(changes=history)
    assert resumed_config(BEGAN | {"rate": 0.2}, before, TABLE) == BEGAN | {"changes": history}
    config = resumed_config(BEGAN | {"decay": 1.0}, before, TABLE)
    assert config == BEGAN | {"changes": [*history, {"from_step": 7, "rate": 0.1, "decay": 1.0}]}
    assert describe_changes(config, before) == [
        "changed                rate from 0.2 to 0.1, from step 7",
        "changed                decay from 0.0 to 1.0, from step 7",
    ]
    assert before.config["changes"] == history


def test_a_flag_that_is_newer_than_the_checkpoint_is_recorded() -> None:
    config = resumed_config(BEGAN | {"new": 1}, saved(), TABLE | {"new": OnResume.REFUSED})
    assert config == BEGAN | {"new": 1}


def test_a_change_from_a_step_that_is_never_run_is_left_out() -> None:
    history = [{"from_step": 3, "rate": 0.2}, {"from_step": 10, "rate": 0.3}]
    assert without_unused(BEGAN | {"changes": history}, 9) == BEGAN | {"changes": history[:1]}
    assert without_unused(BEGAN | {"changes": history}, 10) == BEGAN | {"changes": history}
    assert without_unused(BEGAN | {"changes": history[1:]}, 9) == BEGAN
