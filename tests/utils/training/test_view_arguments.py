"""Flags of views: what they take and refuse."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from utils.training.view_arguments import ViewArguments


def test_by_default_an_example_has_one_view_and_keeps_its_tokens() -> None:
    assert ViewArguments() == ViewArguments(views=1, token_dropout=0.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"views": 0}, "--views=0: give a whole number of at least 1"),
        ({"token_dropout": 1.0}, "--token_dropout=1.0: give a number of at least 0 and below 1"),
        ({"token_dropout": -0.1}, "--token_dropout=-0.1: give a number of at least 0 and below 1"),
        ({"token_dropout": float("nan")}, "--token_dropout=nan: give a number of at least 0 and below 1"),
    ],
)
def test_mistakes_are_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{told}"):
        ViewArguments(**given)
