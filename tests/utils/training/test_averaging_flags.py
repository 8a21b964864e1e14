"""The flags of averages mean the same in every program, and a mistake is refused by its flag."""

from __future__ import annotations

from dataclasses import fields

import pytest

from dptune import InvalidArgument
from scripts.generate_train_command import JobArguments
from utils.classification.step_arguments import StepArguments
from utils.training.averaging_flags import AVERAGE_LAST, EMA, averaging_of
from utils.training.optimization_arguments import OptimizationArguments


@pytest.mark.parametrize("group", [OptimizationArguments, StepArguments, JobArguments])
def test_every_program_has_the_same_two_flags(group: type) -> None:
    found = {one.name: one for one in fields(group)}
    assert dict(found["ema"].metadata) == EMA
    assert dict(found["average_last"].metadata) == AVERAGE_LAST
    assert found["ema"].default is found["average_last"].default is None


def test_the_flags_name_an_average() -> None:
    assert averaging_of(0.9, None).ema == 0.9
    assert averaging_of(None, 0.25).average_last == 0.25
    assert averaging_of(None, None).identity == {}


@pytest.mark.parametrize(("values", "flag"), [((1.0, None), "--ema=1.0"), ((None, 2.0), "--average_last=2.0")])
def test_a_mistake_names_its_flag(values: tuple[float | None, float | None], flag: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{flag}: "):
        averaging_of(*values)
