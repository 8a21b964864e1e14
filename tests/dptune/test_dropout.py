"""Dropout masks: new and secret in every step, repeatable with a test seed, different on each rank."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dptune.dropout import draw_new_masks


def mask(rank: int = 0, step: int = 1, *, test_seed: int | None = None) -> list[bool]:
    draw_new_masks(rank, step, test_seed=test_seed)
    return F.dropout(torch.ones(64)).ne(0).tolist()


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
