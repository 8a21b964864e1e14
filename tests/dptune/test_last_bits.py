"""The last bits of a released gradient reveal nothing: they are those of a grid that the noise alone decides.

Each test is an attack that succeeded when noise was added in float32: it looks for values that only one sum can reach.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, Ledger, PrivacyConfig, PrivateStep, add_lora
from dptune.noise import GaussianNoise
from tests.private_sum import NoNoise
from tests.tiny import tiny_llama

SIGMA, ROWS = 20.0, 16  # one step at this noise has an epsilon of 0.19


def config(rows: int = ROWS) -> PrivacyConfig:
    return PrivacyConfig(
        num_examples=rows, expected_batch_size=rows, steps=1, clip_norm=1.0, noise_multiplier=SIGMA, delta=1e-6
    )


def released(
    model: nn.Module, losses: Callable[[], Tensor], tmp_path: Path, noise: GaussianNoise | NoNoise | None = None
) -> Tensor:
    """The noisy sum of one step, flat, float64; the divisor is a power of two, so that nothing is rounded."""
    with PrivateStep(model, config(), ledger=Ledger(tmp_path / "ledger.jsonl"), noise=noise) as step:  # type: ignore[arg-type]
        step.backward(losses())
        step.finish()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double() * ROWS


def reached_from(sums: Tensor, noisy: Tensor) -> Tensor:
    """Whether a float32 noise value next to the right one leads from each sum to the noisy sum, in float32."""
    sums, noisy = sums.float(), noisy.float()
    low = high = ((noisy - sums).double() / SIGMA).float()
    found = torch.zeros(len(sums), dtype=torch.bool)
    for _ in range(12):
        for candidate in (low, high):
            found |= sums.clone().add_(candidate, alpha=SIGMA) == noisy
        low, high = (torch.nextafter(one, torch.tensor(end)) for one, end in ((low, -torch.inf), (high, torch.inf)))
    return found


@pytest.mark.parametrize("there", [True, False])
def test_membership_cannot_be_read_off_the_last_bits(there: bool, tmp_path: Path) -> None:
    model = tiny_llama(0, vocab_size=60, hidden=32, layers=1)
    add_lora(model, rank=4, alpha=8.0, targets=["q_proj", "v_proj"])
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    model.eval()
    ids = torch.randint(3, 60, (ROWS + 1, 10), generator=torch.Generator().manual_seed(2))
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = CausalLMLoss(model)
    candidates = []
    for rows in (ids, ids[:-1]):
        candidates.append(released(model, partial(losses, rows, rows), tmp_path, NoNoise(size)))
    rows = ids if there else ids[:-1]
    noisy = [released(model, partial(losses, rows, rows), tmp_path) for _ in range(4)]
    shares = [[reached_from(sums, one).float().mean().item() for one in noisy] for sums in candidates]
    with_row, without = (sum(of) / len(of) for of in shares)
    assert abs(with_row - without) < 0.05, "neither sum explains the released values better than the other"


def test_a_coordinate_that_no_row_touched_looks_like_the_others(tmp_path: Path) -> None:
    """A row of an embedding has a sum of exactly zero unless its token was drawn."""
    torch.manual_seed(0)
    model = nn.Embedding(50, 64)
    ids = torch.randint(10, 50, (ROWS, 5))
    noisy = released(model, lambda: (model(ids) * 1e-2).sum((1, 2)), tmp_path).view(50, 64)
    untouched, touched = noisy[:10], noisy[10:]
    for part in (untouched, touched):
        multiples = part / config().grid()
        assert torch.equal(multiples, multiples.round())
