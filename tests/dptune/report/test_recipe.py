"""A command line to repeat a run: complete in what decides the result, silent about what is private."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dptune.report.recipe import command_line


class Schedule(Enum):
    COSINE = "cosine"


@dataclass
class Flags:
    train_file: list[str] = field(default_factory=list)
    model: str = "none"
    style: str = field(default="plain", metadata={"choices": ("plain", "chat")})
    layers: list[str] | None = None
    rank: int = 16
    rate: float = 1e-3
    quiet: bool = False
    shuffle: bool = True
    schedule: Schedule | None = None
    token: str | None = field(default=None, repr=False)


SECRET = {"train_file": ["/home/ann/my rows.json", "x"], "model": "/home/ann/llama", "token": "hf_secret"}


def line(given: dict[str, Any], **how: Any) -> str:
    return command_line("train.py", Flags(**given), **how)


def test_a_text_of_the_user_becomes_a_placeholder_and_a_secret_is_left_out() -> None:
    assert line(SECRET) == "train.py --train_file TRAIN_FILE TRAIN_FILE --model MODEL"
    assert line({"style": "x y"}) == "train.py --style STYLE"  # no choice of the program


def test_numbers_switches_and_choices_are_told_as_they_are() -> None:
    given = {"style": "chat", "rank": 4, "rate": 3e-5, "quiet": True, "shuffle": False, "schedule": Schedule.COSINE}
    assert line(given) == "train.py --style chat --rank 4 --rate 3e-05 --quiet --no_shuffle --schedule cosine"


def test_defaults_are_told_only_if_asked_for() -> None:
    assert line({}) == "train.py"
    assert line({}, always=["rank", "quiet", "layers"]) == "train.py --rank 16"  # a switch that is off has no word
    assert line({"rank": 4, "rate": 1}, never=["rank"]) == "train.py --rate 1"


def test_texts_that_may_be_published_are_shown_if_a_shell_takes_them_as_they_are() -> None:
    assert line({"layers": ["*.q_proj", "a`b"]}, shown=["layers"]) == "train.py --layers *.q_proj LAYERS"
    assert line(SECRET, never=["train_file"], names={"model": "llama"}) == "train.py --model llama"
    assert line({}, names={"model": "llama"}) == "train.py --model llama"


def test_a_long_line_is_wrapped_as_a_shell_reads_it() -> None:
    wrapped = line({"layers": ["layer_of_the_model"] * 12}, shown=["layers"])
    assert max(map(len, wrapped.splitlines())) <= 100
    assert len(wrapped.splitlines()) > 2
    words = shlex.split(wrapped.replace("\\\n", " "))
    assert words == ["train.py", "--layers", *["layer_of_the_model"] * 12]


def test_a_flag_stands_with_its_values_on_one_line() -> None:
    shown = line({"style": "chat", "layers": ["layer_of_the_model"] * 4, "rank": 4}, shown=["layers"])
    layers = " ".join(["--layers", *["layer_of_the_model"] * 4])
    assert shown.splitlines() == ["train.py --style chat \\", f"    {layers} \\", "    --rank 4"]
