"""A whole model on 1 and 2 processes: the same private sum, the same weights to the bit, noise of the same size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dptune import CausalLMLoss, GaussianNoise, Ledger, PrivateStep, deal, trainable_parameters
from dptune.ranks import require_equal
from tests.examples import padded, random_examples
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.whole_models import whole_model

EXAMPLES = random_examples(11, seed=5)
LENGTHS = np.array([len(ids) for ids, _ in EXAMPLES])
DRAWS = (np.arange(11), np.array([3]), np.array([], dtype=np.int64))


def _sums(rank: int, world_size: int, gather: Any, folder: Path, name: str, noisy: bool) -> list[Tensor]:
    """The release of each of DRAWS times the expected batch size, flat."""
    torch.set_num_threads(1)
    model, config = whole_model(name), config_for(11, clip_norm=0.2)
    size = sum(parameter.numel() for parameter in trainable_parameters(model))
    noise: Any = GaussianNoise(size) if noisy else NoNoise(size)
    ledger = Ledger(folder / "ledger.jsonl") if rank == 0 else None
    ranks = {"gather": gather, "rank": rank, "world_size": world_size}
    optimizer, released = torch.optim.SGD(model.parameters(), lr=0.1), []
    with PrivateStep(model, config, ledger=ledger, noise=noise, **ranks) as step:
        losses = CausalLMLoss(model)
        for draw in DRAWS:
            for rows in deal(draw, LENGTHS, token_budget=60, ranks=world_size)[rank]:
                batch = padded([EXAMPLES[row] for row in rows]) if len(rows) else padded([([0], [-100])])
                step.backward(losses(*batch))
            step.finish()
            grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
            released.append(torch.cat(grads).clone() * config.expected_batch_size)
            optimizer.step()
    if gather is not None:
        require_equal(model.parameters(), gather)
    return released


def _in_process(rank: int, gather: Any, folder: Path, name: str, noisy: bool) -> list[Tensor]:
    return _sums(rank, 2, gather, folder, name, noisy)


@pytest.mark.parametrize("name", ["GPT-2", "OPT"])
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = _sums(0, 1, None, tmp_path / "alone", name, noisy=False)
    one, other = run_processes(2, _in_process, tmp_path, name, False)
    for own, first, second in zip(alone, one, other, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, own, rtol=1e-6, atol=1e-9)
    assert not alone[-1].any()
    assert alone[0].norm() > 0.5


def test_two_processes_add_noise_of_the_size_of_one(tmp_path: Path) -> None:
    one, other = run_processes(2, _in_process, tmp_path, "GPT-2", True)
    assert torch.equal(one[-1], other[-1])  # an empty draw: noise alone
    n, std = len(one[-1]), 0.2 * config_for(11, clip_norm=0.2).noise_multiplier
    assert one[-1].std().item() == pytest.approx(std, rel=5 / (2 * n) ** 0.5)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == len(DRAWS)
