"""The choice of a token: transformers' temperature, top_k and top_p, with random numbers that are given."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from utils.generation.choosing import TokenChoice, chances

VOCABULARY, GRID = 30, 4000


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1.0])
def test_tokens_come_as_often_as_transformers_says(temperature: float, top_k: int, top_p: float) -> None:
    scores_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    wanted_V = warpers(torch.zeros(1, 1), scores_V[None].clone())[0].double().softmax(0)
    even = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = TokenChoice(temperature, top_k, top_p)(scores_V.expand(GRID, -1), even)
    found_V = torch.bincount(tokens, minlength=VOCABULARY) / GRID
    assert (found_V - wanted_V).abs().max() < 1.5 / GRID
    assert not found_V[wanted_V == 0].any()


def test_the_ends_of_the_unit_interval_give_tokens_that_can_come() -> None:
    scores = torch.full((2, VOCABULARY), -torch.inf)
    scores[:, 3:6] = 0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for choice in (TokenChoice(1.0, 0, 1.0), TokenChoice(1.0, 2, 1.0), TokenChoice(1.0, 0, 0.9)):
        assert set(choice(scores, ends).tolist()) <= {3, 4, 5}


def test_no_sampling_takes_the_likeliest() -> None:
    scores = torch.randn(5, VOCABULARY)
    greedy = TokenChoice.of(GenerationConfig(do_sample=False, top_k=3))
    assert torch.equal(greedy(scores, torch.rand(5)), scores.argmax(1))


def test_settings_that_are_not_there_are_off() -> None:
    assert TokenChoice.of(GenerationConfig(do_sample=True, top_k=0)) == TokenChoice(1.0, 0, 1.0)
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=9, top_p=0.8)
    assert TokenChoice.of(config) == TokenChoice(0.5, 9, 0.8)


def test_chances_follow_their_seed_alone() -> None:
    state, cpu = torch.get_rng_state(), torch.device("cpu")
    first, again, other = (chances(seed, 3, 5, cpu) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first.unique()) == first.numel()
