"""Flags that only a dry run reads."""

from __future__ import annotations

from typing import Any

import pytest

from dptune._validate import InvalidArgument
from utils.cli.flags import parse
from utils.training.arguments import CAUSAL_LM_GROUPS, ONLY_DRY, Groups
from utils.training.planning_arguments import PlanningArguments

LINE = ["--model_name_or_path", "x", "--output_dir", "x", "--noise_multiplier", "1"]
GIVEN = {"for_device": "L4", "for_devices": "2", "num_examples": "100"}


def groups(*words: str) -> Groups:
    return Groups(*parse(*CAUSAL_LM_GROUPS, args=[*LINE, *words]))


def test_a_device_is_found_by_its_name() -> None:
    device = PlanningArguments(for_device="L4", for_devices=4).device
    assert device is not None
    assert device.name == "L4 24GB"
    assert PlanningArguments().device is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"for_device": "H1000"}, "^--for_device='H1000': give one of"),
        ({"for_devices": 2}, "^--for_devices=2: says how many, and --for_device says which"),
        ({"for_device": "L4", "for_devices": 0}, "^--for_devices=0: give a whole number"),
        ({"num_examples": 0}, "^--num_examples=0: give a whole number"),
    ],
)
def test_mistakes_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        PlanningArguments(**given)


def test_each_of_them_is_refused_without_a_dry_run() -> None:
    assert GIVEN.keys() == set(ONLY_DRY)
    words = [word for name, value in GIVEN.items() for word in (f"--{name}", value)]
    for name in ONLY_DRY:
        with pytest.raises(InvalidArgument, match=f"^--{name}=.*: is read only with --dry_run: give that too"):
            groups(*words).refuse_unread({name})
    groups(*words, "--dry_run").refuse_unread({*ONLY_DRY, "dry_run"})


@pytest.mark.parametrize("data", ["--train_file", "--dataset_name"])
def test_a_number_of_examples_beside_data_is_refused(data: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--num_examples=9: the data say how many there are"):
        groups("--num_examples", "9", data, "x", "--dry_run").refuse_unread({"num_examples"})
