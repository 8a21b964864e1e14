"""Random numbers of models and data that nobody can predict: dropout masks, crops, augmentations.

torch draws all masks from one generator, row by row. So an example's mask depends on the examples before it: removing
one example changes the masks, the gradients and the sum of all later ones. Anyone who knows the generator's seed (a
program's seed) could look for that shift, and the sum would change by more than one example's share. With a secret
seed, every mask is an independent random mask of its example alone, and the bound holds for every outcome of the masks.
The same holds for data sets and collators that draw from torch, numpy or Python's `random`.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dptune.devices import restored_randomness
from dptune.keystream import Keystream

_SEED_BITS = 63


def new_randomness(rank: int, step: int, *, test_seed: int | None) -> None:
    """Give all generators a new secret seed. Call it before the first forward pass of every private step.

    Args:
        rank: number of this process, so that ranks draw different masks with a test seed too.
        step: number of the step, from 1.
        test_seed: makes the masks repeatable. For tests only: it protects nobody.
    """
    if test_seed is None:
        forget_randomness()
        return
    stream = Keystream.for_tests(f"{test_seed} dropout of rank {rank} in step {step}")
    _seed_all(int(stream.words(1)[0]) >> 64 - _SEED_BITS)


def forget_randomness() -> None:
    """Give all generators a secret seed: before data are read, and after a step.

    After a step, because a checkpoint with a generator's state would reveal the numbers of that step.
    """
    _seed_all(secret_seed())


def secret_seed() -> int:
    """A number of 63 bits from the operating system, for `torch.Generator.manual_seed`."""
    return secrets.randbits(_SEED_BITS)


@contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, for checks; afterwards all generators are where they were.

    Args:
        device: where the model computes.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with restored_randomness(device):
        _seed_all(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
