"""Random numbers of models and data: new and secret in every step, repeatable with a test seed, different per rank."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dptune.randomness import fixed_randomness, forget_randomness, new_randomness


def mask(rank: int = 0, step: int = 1, *, test_seed: int | None = None) -> list[bool]:
    new_randomness(rank, step, test_seed=test_seed)
    return F.dropout(torch.ones(64)).ne(0).tolist()


def seed_all() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def numbers() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), np.random.random()


def test_a_seed_does_not_make_masks_repeatable() -> None:
    """--seed sets torch's generator, but examples do not get the masks that it would draw."""
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        found.append(mask())
    assert found[0] != found[1] != found[2] != found[0]


def test_a_test_seed_does() -> None:
    assert mask(1, 5, test_seed=3) == mask(1, 5, test_seed=3)
    others = [mask(0, 5, test_seed=3), mask(1, 6, test_seed=3), mask(1, 5, test_seed=4)]
    assert all(other != mask(1, 5, test_seed=3) for other in others)


@pytest.mark.parametrize("renew", [forget_randomness, lambda: new_randomness(0, 1, test_seed=None)])
def test_every_generator_gets_a_new_secret(renew) -> None:
    """Data sets and collators draw from numpy and from Python as well."""
    found = []
    for _ in range(2):
        seed_all()
        renew()
        found.append(numbers())
    assert all(one != other for one, other in zip(*found, strict=True))


def test_checks_use_the_same_numbers_each_time_and_leave_generators_as_they_were() -> None:
    seed_all()
    expected = numbers()
    seed_all()
    found = []
    for _ in range(2):
        with fixed_randomness(torch.device("cpu")):
            found.append(numbers())
    assert found[0] == found[1]
    assert numbers() == expected
