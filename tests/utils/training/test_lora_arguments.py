"""Flags of what is trained: adapters of the usual layers, unless parameters are named."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.lora_targets import DEFAULT_TARGETS
from utils.cli.flags import parse
from utils.training.lora_arguments import LoraArguments


def test_by_default_the_usual_layers_get_adapters() -> None:
    one, other = LoraArguments(), LoraArguments()
    assert (one.trainable, one.lora_target_modules) == (None, list(DEFAULT_TARGETS))
    one.lora_target_modules.append("lm_head")
    assert other.lora_target_modules == list(DEFAULT_TARGETS)


def test_several_patterns_are_one_flag() -> None:
    (given,) = parse(LoraArguments, args=["--trainable", "*.mlp.*", "norms", "--lora_target_modules", "q_proj"])
    assert (given.trainable, given.lora_target_modules) == (["*.mlp.*", "norms"], ["q_proj"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"initial_adapter_is_public": True},
            "--initial_adapter_is_public=True: is not read without --initial_adapter",
        ),
        ({"initial_adapter": "a", "trainable": ["all"]}, "--initial_adapter='a': --trainable trains no adapter"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        LoraArguments(**flags)
