"""Old flags: renamed if they have a new name, else refused. The new names exist."""

from __future__ import annotations

from dataclasses import fields

import pytest

from dptune import InvalidArgument
from dptune.integrations.transformers import TrainingArguments
from utils.cli.old_flags import RENAMED, WITHOUT_SUCCESSOR, with_new_names

KNOWN = {one.name for one in fields(TrainingArguments)}


def test_a_line_of_new_flags_stays_as_it_is() -> None:
    line = ["--eval_strategy", "steps", "--learning-rate=1e-4", "evaluation_strategy", "--misspelt", "--use_cpu"]
    assert with_new_names(line, KNOWN) == (line, [])


@pytest.mark.parametrize("old", sorted(RENAMED.keys() - KNOWN))
def test_an_old_name_becomes_the_new_one_with_its_value(old: str) -> None:
    new = RENAMED[old]
    assert new in KNOWN
    for spelt in (f"--{old}", f"--{old.replace('_', '-')}"):
        words, notes = with_new_names([spelt, "3", f"{spelt}=4"], KNOWN)
        assert words == [f"--{new}", "3", f"--{new}=4"]
        assert notes == [f"--{old} is called --{new} now"] * 2


def test_an_older_release_that_knows_the_name_keeps_it() -> None:
    assert with_new_names(["--no_cuda"], KNOWN | {"no_cuda"}) == (["--no_cuda"], [])


@pytest.mark.parametrize("old", sorted(WITHOUT_SUCCESSOR.keys() - KNOWN))
def test_what_has_no_successor_is_refused_with_a_remedy(old: str) -> None:
    with pytest.raises(InvalidArgument, match=f"--{old}='given': transformers no longer has it; [a-z]+ "):
        with_new_names([f"--{old}"], KNOWN)


def test_both_names_of_a_flag_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"--no_cuda='given': is the old name of --use_cpu"):
        with_new_names(["--use_cpu", "--no_cuda"], KNOWN)
