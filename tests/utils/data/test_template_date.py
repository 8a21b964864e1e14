"""A chat template tells the day on which its run began."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from dptune._validate import InvalidArgument
from tests.tiny import tiny_tokenizer
from utils.data.prompts import format_prompt
from utils.data.template_date import date_of_training, require_day, tells_date, today, told_date

TELLING = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def set_clock(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The library's clock stands at this moment."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:  # noqa: ARG003
            return datetime.fromisoformat(moment)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_a_template_tells_the_day_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    assert not tells_date(tokenizer)
    tokenizer.chat_template = TELLING
    assert tells_date(tokenizer)
    set_clock(monkeypatch, "2026-02-01T00:30:00")
    with told_date("2026-01-31"):
        assert format_prompt("Hi", "chat", tokenizer) == "31 Jan 2026Hi"
    with told_date(None):
        assert format_prompt("Hi", "chat", tokenizer) == "01 Feb 2026Hi"
    assert today() == "2026-02-01"


def test_the_clock_is_right_again_after_an_error() -> None:
    real = chat_template_utils.datetime
    with pytest.raises(KeyError), told_date("2026-01-31"):
        raise KeyError
    assert chat_template_utils.datetime is real


def test_a_library_that_asks_another_clock_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "render_jinja_template", lambda *_, **__: (["2026-02-01"], []))
    with pytest.raises(RuntimeError, match="tell 2026-02-01 instead of 2026-01-31"), told_date("2026-01-31"):
        pass


@pytest.mark.parametrize("trained", ["lora_weights.bin", "", "checkpoint-4/lora_weights.bin", "model"])
def test_what_a_training_left_knows_its_date(trained: str, tmp_path: Path) -> None:
    for folder in ("checkpoint-4", "model"):
        (tmp_path / folder).mkdir()
    assert date_of_training(tmp_path / trained) is None
    (tmp_path / "run_config.json").write_text(json.dumps({"seed": 0}))
    assert date_of_training(tmp_path / trained) is None
    (tmp_path / "run_config.json").write_text(json.dumps({"template_date": "2026-01-31"}))
    assert date_of_training(tmp_path / trained) == "2026-01-31"


def test_a_day_is_a_day() -> None:
    require_day("2026-01-31", "--template_date")
    with pytest.raises(InvalidArgument, match="--template_date='31 Jan': give a day as YYYY-MM-DD"):
        require_day("31 Jan", "--template_date")
