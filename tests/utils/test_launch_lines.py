"""Launch lines: the configuration and the number of processes that a job needs, and a line that can be copied."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from utils.launch_lines import PLAIN_CONFIG, SHARDED_CONFIG, as_command, as_line, launch_words

ROOT = Path(__file__).resolve().parents[2]


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
