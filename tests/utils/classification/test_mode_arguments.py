"""Flags of what is trained: only what a mode uses is judged."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from tests.classifier_settings import settings


def test_what_a_mode_does_not_use_is_not_judged() -> None:
    given = settings("--finetune_mode", "last-layer", "--num_prepend_tokens", "0", "--lora_r", "0")
    assert given.virtual_tokens == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--finetune_mode", "prefix+lora", "--num_prepend_tokens", "0"),
            "--num_prepend_tokens=0: give a whole number",
        ),
        (("--finetune_mode", "prefix+lora", "--lora_r", "0"), "--lora_r=0: give a whole number"),
        (("--prefix_projection",), "--prefix_projection=True: needs a prefix mode, not --finetune_mode full"),
    ],
)
def test_a_mistake_names_the_flag(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings(*flags)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        settings("--finetune_mode", "dora")
    assert ended.value.code == 2
