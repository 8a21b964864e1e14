"""Dropout whose masks nobody can foretell.

torch draws masks from one generator, in the order of the rows. Which of its numbers make an example's mask therefore
depends on the examples before it: leave one out, and all behind it get other masks, other gradients and another sum.
Whoever knew the generator's seed (a program's seed) could look for that shift, and the sum would move by more than
one example's share. Under a seed that nobody knows every mask is just a fresh random one, drawn for its example alone,
and the bound holds for each way in which they can fall.
"""

from __future__ import annotations

import secrets

import torch

from dptune.keystream import Keystream

_SEED_BITS = 63


def draw_new_masks(rank: int, step: int, *, test_seed: int | None) -> None:
    """Give torch's generators a fresh secret seed; call it before the first forward pass of every private step.

    Args:
        rank: this process, so that ranks draw different masks under a test seed too.
        step: its number, from 1.
        test_seed: makes the masks repeatable; for tests, it protects nobody.
    """
    seed = secrets.randbits(_SEED_BITS)
    if test_seed is not None:
        seed = int(Keystream.for_tests(f"{test_seed} dropout of rank {rank} in step {step}").words(1)[0])
        seed >>= 64 - _SEED_BITS
    torch.manual_seed(seed)


def forget_masks() -> None:
    """Put another secret in the place of the last step's, which checkpoints with torch's generator would tell."""
    torch.manual_seed(secrets.randbits(_SEED_BITS))
