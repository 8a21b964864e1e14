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


@pytest.mark.parametrize("name", ["early_stopping_patience", "sample_every"])
def test_a_count_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^--{name}=0: "):
        OutputArguments("out", **{name: 0})  # type: ignore[arg-type]


def test_flags_that_nothing_reads_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^--validation_is_public=True: is read only with --early_stopping"):
        OutputArguments("out", validation_is_public=True)
    with pytest.raises(InvalidArgument, match=r"^--sample_prompts='p': is not read without --sample_every"):
        OutputArguments("out", sample_prompts="p")


# --- what held-out rows may decide ---

STOPS, KEEPS = {"early_stopping_patience": 2}, {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("flags", "facts", "message"),
    [
        (
            STOPS,
            {},
            "^--early_stopping_patience=2: the result would depend on the held-out rows, which epsilon does not",
        ),
        (
            KEEPS,
            {},
            r"^--load_best_model_at_end=True: .*; give --validation_is_public if they are public, or of people",
        ),
        (
            STOPS,
            {"private": False, "has_validation": False},
            "^--early_stopping_patience=2: there are no held-out rows",
        ),
        (KEEPS, {"private": False, "sharded": True}, "^--load_best_model_at_end=True: is not built for sharded"),
    ],
)
def test_held_out_rows_decide_nothing_that_epsilon_would_not_cover(
    flags: dict[str, Any], facts: dict[str, bool], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        OutputArguments("out", **flags).require_selection(**{"private": True, "has_validation": True} | facts)


@pytest.mark.parametrize(
    ("flags", "private"),
    [({}, True), (STOPS, False), (STOPS | KEEPS | {"validation_is_public": True}, True)],
)
def test_public_rows_and_rows_of_a_run_without_privacy_may_decide(flags: dict[str, Any], private: bool) -> None:
    output = OutputArguments("out", **flags)
    output.require_selection(private=private, has_validation=True)
    assert output.selection.decides is bool(flags)
