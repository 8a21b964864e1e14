"""Flags of results: each task gets a folder, and a count below the least is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune import InvalidArgument
from tests.classifier_settings import settings


def test_outputs_may_go_elsewhere() -> None:
    given = settings("--output_dir", "x", "--checkpointing_steps", "0", "--resume_from_checkpoint", "latest")
    assert given.folder == Path("x")
    output = given.results.of_task(Path("x/sst2"))
    assert (output.output_dir, output.checkpointing_steps, output.resume_from_checkpoint) == ("x/sst2", 0, "latest")


def test_a_mistake_names_the_flag() -> None:
    with pytest.raises(InvalidArgument, match="--eval_freq=0: give a whole number"):
        settings("--eval_freq", "0")
