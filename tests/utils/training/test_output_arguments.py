"""Flags of output: counts are refused by their flag; `tests/utils/cli/test_trackers.py` has the trackers."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from utils.training.output_arguments import OutputArguments


@pytest.mark.parametrize(("flag", "least"), [("eval_freq", 1), ("checkpointing_steps", 0), ("save_total_limit", 1)])
def test_a_count_below_the_least_is_refused_by_its_flag(flag: str, least: int) -> None:
    allowed: dict[str, Any] = {flag: least}
    assert getattr(OutputArguments("out", **allowed), flag) == least
    with pytest.raises(InvalidArgument, match=f"^--{flag}={least - 1}: "):
        OutputArguments("out", **{flag: least - 1})


def test_all_checkpoints_may_be_kept() -> None:
    assert OutputArguments("out", save_total_limit=None).save_total_limit is None
