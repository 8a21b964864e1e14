"""Flags are checked before anything is loaded; results never go where things are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dptune._validate import InvalidArgument
from utils.attacks.arguments import AttackArguments


def test_results_go_to_the_run() -> None:
    assert AttackArguments("out").folder == Path("out/attack")
    assert AttackArguments("out", output_dir="there").folder == Path("there")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_rows": 1}, "--max_rows=1"),
        ({"min_k": 0.0}, "--min_k=0"),
        ({"min_k": 101.0}, "--min_k=101"),
        ({"candidates": 0}, "--candidates=0"),
        ({"num_samples": -1}, "--num_samples=-1"),
        ({"seed": -1}, "--seed=-1"),
        ({"output_dir": "/dev/null/attack"}, "--output_dir='/dev/null/attack': /dev/null is a file; give a folder"),
        ({"output_dir": "out/publish/attack"}, "--output_dir='out/publish/attack': lies in a folder publish"),
    ],
)
def test_a_mistake_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        AttackArguments("out", **given)
    assert str(refused.value).startswith(told)


def test_a_folder_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(InvalidArgument, match=r"^--output_dir='/new/attack': / cannot be written to; give another"):
        AttackArguments("out", output_dir="/new/attack")
