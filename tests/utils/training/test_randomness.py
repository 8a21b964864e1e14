"""Secret unless asked otherwise, one draw for all ranks, a noise for each, and a test seed goes on where it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import run_processes
from utils.cli.launch import make_accelerator
from utils.training.plan import RunPlan
from utils.training.randomness import make_noise, make_sampler

PLAN = RunPlan(privacy=None, num_examples=500, expected_batch_size=100.0, steps=9)
SIZE = 1000


def draws(*, test_seed: int | None, completed: int = 0, count: int = 6) -> list[list[int]]:
    sampler = make_sampler(PLAN, make_accelerator(), test_seed=test_seed, completed=completed)
    return [sampler.draw().tolist() for _ in range(count)]


def noises(*, test_seed: int | None, rank: int = 0, completed: int = 0, count: int = 6) -> torch.Tensor:
    with make_noise(SIZE, rank, test_seed=test_seed, completed=completed) as noise:
        return torch.stack([noise.take() for _ in range(count)])


def test_two_runs_differ_whatever_the_seeds() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        found.append((draws(test_seed=None), noises(test_seed=None)))
    (first, noise), (second, other) = found
    assert not any(one == two for one, two in zip(first, second, strict=True))
    assert not (noise == other).all(1).any()


def test_a_run_is_keyed_in_secret_and_a_test_seed_is_not() -> None:
    for seed, secret in ((None, True), (7, False)):
        assert make_sampler(PLAN, make_accelerator(), test_seed=seed, completed=0).keystream.secret is secret
        with make_noise(SIZE, 0, test_seed=seed, completed=0) as noise:
            assert noise.keystream.secret is secret
            assert ("FIXED key" in noise.source) is not secret


def test_draws_are_of_the_plan() -> None:
    sampler = make_sampler(PLAN, make_accelerator(), test_seed=1, completed=0)
    assert (sampler.num_examples, sampler.sampling_probability) == (500, 0.2)
    assert 60 < len(sampler.draw()) < 140


def test_a_test_seed_repeats_and_another_does_not() -> None:
    assert draws(test_seed=3) == draws(test_seed=3)
    assert draws(test_seed=3) != draws(test_seed=4)
    assert torch.equal(noises(test_seed=3), noises(test_seed=3))
    assert not torch.equal(noises(test_seed=3), noises(test_seed=4))
    assert draws(test_seed=0) == draws(test_seed=0)  # zero is a seed


@pytest.mark.parametrize("completed", [1, 2, 5])
def test_a_resumed_run_with_a_test_seed_goes_on_where_it_was(completed: int) -> None:
    assert draws(test_seed=3, completed=completed, count=6 - completed) == draws(test_seed=3)[completed:]
    for rank in (0, 1):
        resumed = noises(test_seed=3, rank=rank, completed=completed, count=6 - completed)
        assert torch.equal(resumed, noises(test_seed=3, rank=rank)[completed:])


@pytest.mark.parametrize("test_seed", [None, 3])
def test_noise_differs_between_ranks_and_steps(test_seed: int | None) -> None:
    vectors = torch.cat([noises(test_seed=test_seed, rank=rank, count=3) for rank in range(3)]).double()
    correlations = torch.corrcoef(vectors) - torch.eye(len(vectors))
    assert correlations.abs().max() < 6 / SIZE**0.5
    assert abs(vectors.square().mean() - 1) < 6 * (2 / vectors.numel()) ** 0.5


def _on_a_rank(rank: int, _gather: Any, _folder: Path) -> dict[str, Any]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # for accelerate; the group is there already
    return {
        "draws": [draws(test_seed=seed, count=2) for seed in (None, 3)],
        "noise": [noises(test_seed=seed, rank=rank, count=1) for seed in (None, 3)],
    }


def test_ranks_share_their_draws_and_not_their_noise(tmp_path: Path) -> None:
    one, other = run_processes(2, _on_a_rank, tmp_path)
    assert one["draws"] == other["draws"]
    assert one["draws"][1] == draws(test_seed=3, count=2)
    assert not any(torch.equal(*pair) for pair in zip(one["noise"], other["noise"], strict=True))
