"""The planner's flags: each mistake is one line, and the speed must be known."""

from __future__ import annotations

from typing import Any

import pytest

from dptune._validate import InvalidArgument
from utils.cli.flags import parse
from utils.planning.arguments import PlannerArguments

RIGHT: dict[str, Any] = {
    "num_examples": 1000,
    "tokens_per_example": 50.0,
    "model_name_or_path": "m",
    "hours": 1.0,
    "target_epsilon": 8.0,
    "tokens_per_second": 100.0,
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens_per_second": None}, "--tokens_per_second=None: the speed is needed; give what you measured"),
        ({"num_examples": 1}, "--num_examples=1: give a whole number of at least 2"),
        ({"tokens_per_example": 0.0}, "--tokens_per_example=0.0: give a finite number above 0"),
        ({"hours": -1.0}, "--hours=-1.0: give a finite"),
        ({"target_epsilon": 0.0}, "--target_epsilon=0.0: give a finite"),
        ({"tokens_per_second": 0.0}, "--tokens_per_second=0.0: give a finite"),
        ({"delta": 0.01}, "--delta=0.01: must be below 1/num_examples"),
        ({"block_size": 0}, "--block_size=0: give a whole"),
        ({"for_devices": 2}, "--for_devices=2: needs --for_device, which names the device; give that too"),
        ({"for_device": "H100", "for_devices": 0}, "--for_devices=0: give a whole"),
        ({"for_device": "card"}, "--for_device='card': give one of A100 40GB"),
        (
            {"for_device": "card 9GB", "tokens_per_second": None},
            "--for_device='card 9GB': its speed is not known; give",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_flag(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        PlannerArguments(**(RIGHT | changes))
    assert str(refused.value).startswith(told)


def test_the_speed_may_be_given_or_estimated_for_a_device() -> None:
    assert PlannerArguments(**RIGHT).device is None
    known = PlannerArguments(**(RIGHT | {"tokens_per_second": None, "for_device": "h100", "for_devices": 4}))
    assert known.device is not None
    assert (known.device.name, known.processes) == ("H100 80GB", 4)
    assert PlannerArguments(**(RIGHT | {"for_device": "card 9GB"})).processes == 1


def test_the_model_has_a_short_name() -> None:
    words = "--num_examples 10 --tokens_per_example 5 --model m --hours 1 --target_epsilon 1 --tokens_per_second 9"
    (given,) = parse(PlannerArguments, args=words.split())
    assert given.model_name_or_path == "m"
