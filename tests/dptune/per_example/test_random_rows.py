"""Rows that stand for private ones: repeatable, of every length that matters, from public bounds alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Phi3Config

from dptune.per_example.random_rows import RandomRow, neighbouring_lengths


def test_a_row_is_its_numbers_own() -> None:
    row = RandomRow(50, 3)
    assert torch.equal(row.tokens(90), row.tokens(90))
    assert not torch.equal(row.tokens(90), RandomRow(50, 4).tokens(90))
    assert row.tokens(90).shape == (50,)
    assert set(row.tokens(3).tolist()) == {1, 2}, "0 often pads"
    assert set(row.tokens(1).tolist()) == {0}
    assert row.normal((2, 3)).shape == (2, 3)


def model(config: Any, virtual: int | None = None) -> Any:
    return SimpleNamespace(config=config, active_peft_config=SimpleNamespace(num_virtual_tokens=virtual))


@pytest.mark.parametrize(
    ("longest", "pairs"),
    [(100, [(7, 100), (50, 100)]), (14, [(7, 14)]), (8, [(7, 8), (4, 8)]), (3, [(2, 3), (1, 3)]), (1, [(1, 1)])],
)
def test_short_rows_are_beside_the_longest(longest: int, pairs: list[tuple[int, int]]) -> None:
    assert neighbouring_lengths(nn.Linear(1, 1), longest) == pairs


def test_rows_around_a_switch_are_beside_each_other() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 40, "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0}
    config = Phi3Config(max_position_embeddings=200, original_max_position_embeddings=40, rope_parameters=rope, **sizes)
    assert neighbouring_lengths(model(config), 100) == [(7, 100), (50, 100), (40, 41)]
    assert (40, 41) not in neighbouring_lengths(model(config), 40), "no row is that long"
    assert {(40, 41), (30, 31)} <= set(neighbouring_lengths(model(config, virtual=10), 100)), "virtual tokens count"


def test_switches_are_found_in_parts_of_a_configuration() -> None:
    parts = {"text": {"rope": {"full": {"original_max_position_embeddings": 20}}}, "max_position_embeddings": 60}
    assert set(neighbouring_lengths(model(parts), 90)) == {(7, 90), (45, 90), (20, 21), (60, 61)}
