"""Checkpoints of a tied model whose trained weights and optimizer states are sharded, and what they must hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptune import trainable_parameters
from dptune.iterate_average import IterateAverage
from dptune.optimizers import DPAdam, LowPassAdam
from dptune.ranks import Ranks
from dptune.run.checkpoint import TrainingState, save_checkpoint
from dptune.run.shards import Shards
from dptune.run.training_state import sharded_tensors, trained_by_name, without_shards
from dptune.sharding import as_shard, own_rows, shard
from tests.processes import run_processes
from tests.whole_models import whole_model
from utils.models.sharded import decoder_layers
from utils.models.trainable import parameters_by_name

Gather = Callable[[Tensor], Tensor]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "dp-adam": partial(DPAdam, noise_std=lambda: 0.01, lr=0.01),
    "lowpass-adam": partial(LowPassAdam, lr=0.01),
}


def broadcast(value: object) -> object:
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def begun(kind: str, *, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A tied model and its optimizer, before any step."""
    model = whole_model("Llama, tied")
    if sharded:
        shard(model.requires_grad_(False), decoder_layers(model), device=torch.device("cpu"))
        model.requires_grad_(True)
    return model, OPTIMIZERS[kind](trainable_parameters(model))


def stepped(kind: str, *, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same after two steps with made-up gradients."""
    model, optimizer = begun(kind, sharded=sharded)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for parameter in trainable_parameters(model):
            grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.grad = as_shard(own_rows(grad, parameter), parameter)
        optimizer.step()
    return model, optimizer


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer states of all ranks, whole. Every rank must call this."""
    found: dict[str, Any] = {}
    for name, parameter in trained_by_name(model, optimizer).items():
        values = {"weight": parameter.detach(), **optimizer.state[parameter]}
        for key, value in values.items():
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[f"{name}.{key}"] = full.clone() if isinstance(full, Tensor) else full
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        assert same, name


def save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    ranks: Ranks,
    average: IterateAverage | None = None,
) -> None:
    """What `utils.training.resume.Checkpoints` does, without a run."""
    tensors = sharded_tensors(model, optimizer)
    shards = Shards(tensors, ranks) if tensors else None
    weights = {} if shards else parameters_by_name(model, list(trained_by_name(model, optimizer)))
    state = TrainingState(
        step=2,
        ledger_steps=0,
        identity={},
        config={},
        weights=weights,
        optimizer=without_shards(optimizer.state_dict()),
        schedule={},
        averaged=0 if average is None else average.count,
        average={} if average is None or shards else average.tensors,
    )
    if ranks.is_main:
        save_checkpoint(folder, state, None, keep=None, shards=shards)
    elif shards:
        shards.help()


def ranks_of_group(rank: int, gather: Gather) -> Ranks:
    return Ranks(rank, dist.get_world_size(), gather=gather, broadcast=broadcast)


def _saved(rank: int, gather: Gather, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for kind in OPTIMIZERS:
        model, optimizer = stepped(kind, sharded=True)
        save(model, optimizer, folder / kind, ranks_of_group(rank, gather))
        found[kind] = contents(model, optimizer)
    return found


def saved_by_two_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    """What the checkpoints hold that two ranks write below `folder`, one for each optimizer."""
    for kind in OPTIMIZERS:
        (folder / kind).mkdir()
    first, second = run_processes(2, _saved, folder)
    for kind in OPTIMIZERS:
        assert_same(second[kind], first[kind])
    return dict(first)
