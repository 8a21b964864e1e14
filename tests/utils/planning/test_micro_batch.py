"""The rows of a forward pass: as many as fit, without recomputing or sharding if possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dptune._validate import InvalidArgument
from tests.tiny import tiny_llama
from utils.models.known_devices import find_device
from utils.models.memory import RESERVE, MemorySettings, fits
from utils.planning.micro_batch import FittedMicroBatch, largest_micro_batch
from utils.training.plan import needs_of
from utils.training.target import target_without_launch

LIKE = MemorySettings(torch.bfloat16, 512, 512, drawn=64)
DEVICE = find_device("L4 24GB")
ROOM = DEVICE.memory - RESERVE


def needing(per_row: float, *, recomputed: float = 1.0, sharded: float = 1.0, fixed: float = 0.0) -> Any:
    """Needs of so much of the device for each row, and factors of it."""

    def needs(settings: MemorySettings) -> Any:
        own = fixed + per_row * settings.token_budget / settings.block_size
        factor = (recomputed if settings.checkpointing else 1) * (sharded if settings.sharded else 1)
        return SimpleNamespace(total=own * factor * ROOM)

    return needs


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (needing(1 / 20), FittedMicroBatch(16)),
        (needing(1 / 5), FittedMicroBatch(4)),
        (needing(1.5, recomputed=0.5), FittedMicroBatch(1, recompute=True)),
        (needing(0.1, fixed=1.5, sharded=0.5), FittedMicroBatch(4, shard=True)),
        (needing(1.5, recomputed=0.8, sharded=0.8), FittedMicroBatch(1, recompute=True, shard=True)),
    ],
)
def test_the_fastest_that_fits_is_chosen(needs: Any, expected: FittedMicroBatch) -> None:
    assert largest_micro_batch(needs, LIKE, target_without_launch(DEVICE, 2)) == expected


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    model = tiny_llama(hidden=1024, layers=1)
    device = find_device("card 1.1GiB")
    with pytest.raises(InvalidArgument, match=r"^for_device='card 1.1GiB': the training does not fit: needs .*; "):
        largest_micro_batch(needs_of(model), LIKE, target_without_launch(device, 1))
    chosen = largest_micro_batch(needs_of(model), LIKE, target_without_launch(DEVICE, 1))
    needs = needs_of(model)
    assert needs is not None
    assert fits(needs(chosen.settings(LIKE, target_without_launch(DEVICE, 1))), DEVICE.memory)


def test_without_an_estimate_or_a_known_memory_everything_fits() -> None:
    assert largest_micro_batch(None, LIKE, target_without_launch(DEVICE, 1)) == FittedMicroBatch(16)
    assert largest_micro_batch(needing(99), LIKE, target_without_launch(None, 1)) == FittedMicroBatch(16)


def test_long_rows_make_smaller_micro_batches() -> None:
    long = MemorySettings(torch.bfloat16, 3000, 3000)
    assert largest_micro_batch(None, long, target_without_launch(None, 1)) == FittedMicroBatch(2)
    longest = MemorySettings(torch.bfloat16, 10**5, 10**5)
    assert largest_micro_batch(None, longest, target_without_launch(None, 1)) == FittedMicroBatch(1)


def test_sharded_ranks_have_the_overhead_of_sharding() -> None:
    target = target_without_launch(DEVICE, 2)
    settings = FittedMicroBatch(2, shard=True).settings(LIKE, target)
    assert (settings.sharded, settings.token_budget) == (True, 1024)
    assert settings.overhead == target.overhead(sharded=True)
