"""A run resumes only from its own checkpoint; the error names every difference."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.run.identity import refuse_other_run

IDENTITY: dict[str, Any] = {
    "run": {"clip_norm": 1.0, "noise_multiplier": 0.9, "target_epsilon": None, "training_data": "ab12"},
    "adapters": {"model.layers.0.q_proj": [2, 32, 32, 4.0]},
    "targets": ["q_proj", "v_proj"],
}


@pytest.mark.parametrize(
    ("saved", "current"),
    [
        (IDENTITY, json.loads(json.dumps(IDENTITY))),
        (IDENTITY, IDENTITY | {"targets": ("q_proj", "v_proj")}),  # both have the same JSON
        ({}, {}),
    ],
)
def test_the_same_run_may_go_on(saved: dict[str, Any], current: dict[str, Any]) -> None:
    try:
        refuse_other_run(saved, current)
        refusal = None
    except InvalidArgument as error:
        refusal = str(error)
    assert refusal is None


@pytest.mark.parametrize(
    ("current", "told"),
    [
        (
            IDENTITY | {"run": IDENTITY["run"] | {"clip_norm": 0.5}},
            ["run.clip_norm was 1.0 in the checkpoint and is 0.5 now"],
        ),
        (
            IDENTITY | {"run": {"clip_norm": 2, "noise_multiplier": 0.9, "target_epsilon": 8.0}},
            ["run.clip_norm was 1.0 ", "run.target_epsilon was None in the checkpoint and is 8.0 now",
             "run.training_data was 'ab12' in the checkpoint and is absent now"],
        ),
        (IDENTITY | {"seed": 1}, ["seed was absent in the checkpoint and is 1 now"]),
        (IDENTITY | {"targets": ["q_proj"]}, ["targets[1] was 'v_proj' in the checkpoint and is absent now"]),
        (IDENTITY | {"targets": []}, ["targets was absent in the checkpoint and is [] now"]),
        (
            IDENTITY | {"adapters": {"model.layers.0.q_proj": [3, 32, 32, 4.0]}},
            ["adapters.model.layers.0.q_proj[0] was 2 in the checkpoint and is 3 now"],
        ),
    ],
)  # fmt: skip
def test_every_difference_is_told_with_both_values(current: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        refuse_other_run(IDENTITY, current)
    message = str(caught.value)
    assert message.startswith("resume_from: ")
    assert "\n" not in message
    for part in told:
        assert part in message
    if told[-1] != "targets was absent in the checkpoint and is [] now":
        assert message.count(" was ") == len(told)


def test_many_differences_and_long_values_stay_one_readable_line() -> None:
    saved_identity, current = ({f"key{i}": letter * 1000 for i in range(12)} for letter in "ab")
    with pytest.raises(InvalidArgument, match="and 7 more differ; resume with the settings") as caught:
        refuse_other_run(saved_identity, current)
    assert str(caught.value).count(" was ") == 5
    assert len(str(caught.value)) < 1200
