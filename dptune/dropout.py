"""Dropout with masks that nobody can predict.

torch draws all masks from one generator, row by row. So an example's mask depends on the examples before it: removing
one example changes the masks, the gradients and the sum of all later ones. Anyone who knows the generator's seed (a
program's seed) could look for that shift, and the sum would change by more than one example's share. With a secret
seed, every mask is an independent random mask of its example alone, and the bound holds for every outcome of the masks.
"""

from __future__ import annotations

import secrets

import torch

from dptune.keystream import Keystream

_SEED_BITS = 63


def draw_new_masks(rank: int, step: int, *, test_seed: int | None) -> None:
    """Give torch's generators a new secret seed. Call it before the first forward pass of every private step.

    Args:
        rank: number of this process, so that ranks draw different masks with a test seed too.
        step: number of the step, from 1.
        test_seed: makes the masks repeatable. For tests only: it protects nobody.
    """
    seed = secrets.randbits(_SEED_BITS)
    if test_seed is not None:
        seed = int(Keystream.for_tests(f"{test_seed} dropout of rank {rank} in step {step}").words(1)[0])
        seed >>= 64 - _SEED_BITS
    torch.manual_seed(seed)


def forget_masks() -> None:
    """Replace the seed of the last step, because a checkpoint with torch's generator state would reveal it."""
    torch.manual_seed(secrets.randbits(_SEED_BITS))
