"""Sampling uses the prompt style of the training, and warns of another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.data.prompts import PROMPT_STYLE_OF_ROWS
from utils.generation.trained_style import chosen_style, style_of_training


@pytest.fixture(params=["lora_weights.bin", "checkpoint-2", "."])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What a training in the chat style left: an adapter's file, a checkpoint, or the run's folder."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "lora_weights.bin").touch()
    (tmp_path / "run_config.json").write_text(json.dumps({PROMPT_STYLE_OF_ROWS: "chat", "prompt_style": "plain"}))
    return tmp_path / request.param


def test_the_style_of_the_rows_is_used(trained: Path) -> None:
    assert style_of_training(trained) == "chat"
    assert chosen_style(None, trained) == ("chat", ["prompt style           chat, as in training"])
    assert chosen_style("chat", trained) == ("chat", [])


def test_another_style_gives_a_warning(trained: Path) -> None:
    style, (told,) = chosen_style("plain", trained)
    assert style == "plain"
    assert told == (
        "warning: --prompt_style plain is not that of the training; texts may be poor, so leave it out to use chat"
    )


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"prompt_style_of_rows": null}', '{"prompt_style_of_rows": "x"}']
)
def test_without_a_record_it_is_plain_or_what_was_asked_for(content: str, tmp_path: Path) -> None:
    assert chosen_style(None, tmp_path) == ("plain", [])
    (tmp_path / "run_config.json").write_text(content)
    assert chosen_style(None, tmp_path) == ("plain", [])
    assert chosen_style("vicuna", tmp_path) == ("vicuna", [])
