"""Columns that belong to a prompt are not left out in silence."""

from __future__ import annotations

from typing import Any

import pytest

from dptune._validate import InvalidArgument
from utils.data.lost_columns import lost_column, refuse_lost_columns
from utils.files.cells import Place

PLACE = Place("--train_file", "a.jsonl", 3)
SECRET = "Jane Roe has measles"


@pytest.mark.parametrize("name", ["input", "Context", "system", "system_prompt", "history", "tools"])
@pytest.mark.parametrize("value", [SECRET, [SECRET], {"a": SECRET}, 7])
def test_a_value_beside_the_instruction_is_refused_and_not_shown(name: str, value: Any) -> None:
    row = {"instruction": "a", "answer": "b", name: value}
    told = rf"row 3 \(counted from 1\): {name} would be left out; join it to instruction"
    with pytest.raises(InvalidArgument, match=told) as caught:
        refuse_lost_columns(row, ("instruction", "answer"), PLACE)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", " \n", [], {}])
def test_a_blank_one_is_no_loss(value: Any) -> None:
    row = {"instruction": "a", "answer": "b", "input": value}
    refuse_lost_columns(row, ("instruction", "answer"), PLACE)
    assert lost_column(row, ("instruction", "answer")) is None


def test_columns_that_are_used_or_belong_to_no_prompt_are_not_lost() -> None:
    assert lost_column({"context": "a", "id": 7, "output": "c", "source": "d"}, ("context",)) is None
