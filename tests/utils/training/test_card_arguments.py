"""Flags of the model card become its fields; a mistake names the flag."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from dptune.report.fields import CardFields
from utils.training.card_arguments import CardArguments


def test_flags_become_fields() -> None:
    assert CardArguments().fields() == CardFields()
    given = CardArguments("ann/base", "mit", ["en", "de"], ["ann/rows"])
    assert given.fields("train.py") == CardFields("ann/base", "mit", ("en", "de"), ("ann/rows",), "train.py")


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"base_model_name": "/home/ann/llama"}, "--base_model_name"),
        ({"card_license": "MIT License"}, "--card_license"),
        ({"card_language": ["English"]}, "--card_language"),
    ],
)
def test_a_mistake_names_the_flag(given: dict, flag: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{flag}="):
        CardArguments(**given)
