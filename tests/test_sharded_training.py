"""Training whole models whose weights are sharded over 1 to 4 real processes equals training them on one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, Ledger, PrivateStep, deal, trainable_parameters
from dptune.clipping_styles import Adaptive, Automatic, Flat, PerLayer
from dptune.flat import released_size
from dptune.sharding import shard
from tests.examples import padded, random_examples
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.whole_models import whole_model

COUNT, CLIP_NORM = 12, 0.5
EXAMPLES = random_examples(COUNT, seed=3)
LENGTHS = np.array([len(ids) for ids, _ in EXAMPLES])
Gather = Callable[[Tensor], Tensor]


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith(("DecoderLayer", "GPT2Block"))]


def sharded(name: str) -> nn.Module:
    model = whole_model(name)
    shard(model.requires_grad_(False), layers_of(model), device=torch.device("cpu"))
    return model.requires_grad_(True)


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def sums_of(model, clipping, gather, rank, world_size, ledger, keep_whole=False):
    config = replace(config_for(COUNT, clip_norm=CLIP_NORM), clipping=clipping)
    losses, found = CausalLMLoss(model), []
    parameters = trainable_parameters(model)
    noise = NoNoise(released_size(model, config, rank))
    with PrivateStep(
        model,
        config,
        ledger=ledger,
        noise=noise,
        gather=gather,
        rank=rank,
        world_size=world_size,
        keep_whole_sum=keep_whole,
    ) as step:
        for draw in [np.arange(COUNT), np.array([], dtype=np.int64), np.array([7])]:
            for rows in deal(draw, LENGTHS, token_budget=32, ranks=world_size)[rank]:
                dummy = (torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100))
                step.backward(losses(*(padded([EXAMPLES[row] for row in rows]) if len(rows) else dummy)))
            step.finish()
            found.append([full(p.grad) * config.divisor for p in parameters])
    return torch.stack([torch.cat([g.flatten() for g in s]) for s in found])


def work(rank, gather, world_size, name, clipping, folder, keep):
    return sums_of(sharded(name), clipping, gather, rank, world_size, Ledger(Path(folder) / "l.jsonl"), keep)


@pytest.mark.parametrize("clipping", [Flat(), PerLayer(), Automatic(), Adaptive(count_noise=5.0)])
@pytest.mark.parametrize("name", ["GPT-2", "Llama, tied", "Llama"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_sum(ranks, name, clipping, tmp_path):
    alone = sums_of(whole_model(name), clipping, None, 0, 1, Ledger(tmp_path / "alone.jsonl"))
    for got in run_processes(ranks, work, ranks, name, clipping, tmp_path, name == "Llama"):
        assert (got - alone).norm() <= 1e-10 * alone.norm()
