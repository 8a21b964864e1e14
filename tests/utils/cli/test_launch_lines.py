"""Launch lines: the configuration and the number of processes that a job needs, and a line that can be copied."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.cli.launch_lines import (
    PLAIN_CONFIG,
    SHARDED_CONFIG,
    as_command,
    as_line,
    launch_words,
    require_not_taken,
    split_at_dashes,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("gpus", "shard", "options"),
    [
        (1, False, [PLAIN_CONFIG, "--num_processes", "1"]),
        (4, False, [PLAIN_CONFIG, "--num_processes", "4", "--multi_gpu"]),
        (4, True, [SHARDED_CONFIG, "--num_processes", "4"]),
    ],
)
def test_gpus_and_sharding_choose_the_configuration(gpus: int, shard: bool, options: list[str]) -> None:
    words = launch_words("train.py", ["--flag"], gpus=gpus, shard=shard)
    assert words == ["--config_file", *options, "train.py", "--flag"]
    assert (ROOT / options[0]).is_file()


def test_the_line_and_the_command_are_the_same_launch() -> None:
    words = launch_words("train.py", ["--stop", "two words", "it's", "$HOME\n"], gpus=1, shard=False)
    assert shlex.split(as_line(words)) == ["accelerate", "launch", *words]
    assert as_command(words) == [sys.executable, "-m", "accelerate.commands.launch", *words]


@pytest.mark.parametrize("words", [["--access_token", "hf_SECRET"], ["--access-token=hf_SECRET"], ["--hub_token", "x"]])
def test_a_secret_is_refused_before_the_line_is_printed(words: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="HF_TOKEN in the environment") as caught:
        require_not_taken(words, {})
    assert "SECRET" not in str(caught.value)


def test_only_flags_that_the_job_decides_are_refused() -> None:
    words, taken = ["--max_tokens_per_device", "4096", "--stop", "a token", "--seed=3"], {"delta": "--delta"}
    require_not_taken(words, taken)
    with pytest.raises(InvalidArgument) as caught:
        require_not_taken([*words, "--delta=1"], taken)
    assert str(caught.value) == "--delta='after --': give --delta before -- instead"


def test_a_file_of_flags_after_the_dashes_is_refused() -> None:
    assert split_at_dashes(["--config", "a.yaml", "--", "--seed", "3"]) == (["--config", "a.yaml"], ["--seed", "3"])
    with pytest.raises(InvalidArgument, match=r"^--config='after --': may hold flags that this program sets"):
        split_at_dashes(["--eps", "8", "--", "--config=a.yaml"])
