"""Checkpoints of sharded weights: written by all ranks, read on another number of ranks and without sharding."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dptune import InvalidArgument, trainable_parameters
from dptune.optimizers import DPAdam
from dptune.ranks import Ranks
from dptune.run.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from dptune.run.shards import Shards
from dptune.sharding import as_shard, own_rows, shard
from tests.processes import run_processes
from tests.whole_models import whole_model
from utils.models.sharded import decoder_layers
from utils.models.trainable import parameters_by_name
from utils.training.training_state import put_back, sharded_tensors, trained_by_name, without_shards

Gather = Callable[[Tensor], Tensor]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "dp-adam": partial(DPAdam, noise_std=lambda: 0.01, lr=0.01),
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


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, ranks: Ranks) -> None:
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
    )
    if ranks.is_main:
        save_checkpoint(folder, state, None, keep=None, shards=shards)
    elif shards:
        shards.help()


def _ranks(rank: int, gather: Gather) -> Ranks:
    return Ranks(rank, dist.get_world_size(), gather=gather, broadcast=broadcast)


def _saved(rank: int, gather: Gather, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for kind in OPTIMIZERS:
        model, optimizer = stepped(kind, sharded=True)
        save(model, optimizer, folder / kind, _ranks(rank, gather))
        found[kind] = contents(model, optimizer)
    return found


def _loaded(_rank: int, _gather: Gather, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for kind in OPTIMIZERS:
        model, optimizer = begun(kind, sharded=True)
        put_back(load_checkpoint(folder / kind / "checkpoint-2"), model, optimizer)
        found[kind] = contents(model, optimizer)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder for each optimizer with a checkpoint that two ranks wrote, and what it must hold."""
    folder = tmp_path_factory.mktemp("two ranks")
    for kind in OPTIMIZERS:
        (folder / kind).mkdir()
    first, second = run_processes(2, _saved, folder)
    for kind in OPTIMIZERS:
        assert_same(second[kind], first[kind])
    return folder, first


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_reads_what_two_wrote(ranks: int, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, wanted = saved
    for found in run_processes(ranks, _loaded, folder):
        for kind in OPTIMIZERS:
            assert_same(found[kind], wanted[kind])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_process_without_sharding_reads_it(kind: str, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, wanted = saved
    model, optimizer = begun(kind, sharded=False)
    put_back(load_checkpoint(folder / kind / "checkpoint-2"), model, optimizer)
    assert_same(contents(model, optimizer), wanted[kind])


def test_ranks_with_shards_read_what_one_process_wrote_whole(tmp_path: Path) -> None:
    wanted = {}
    for kind in OPTIMIZERS:
        model, optimizer = stepped(kind, sharded=False)
        (tmp_path / kind).mkdir()
        save(model, optimizer, tmp_path / kind, Ranks())
        wanted[kind] = contents(model, optimizer)
    for found in run_processes(3, _loaded, tmp_path):
        for kind in OPTIMIZERS:
            assert_same(found[kind], wanted[kind])


def test_each_rank_writes_its_shards_alone(saved: tuple[Path, dict[str, Any]]) -> None:
    sizes = [path.stat().st_size for path in sorted((saved[0] / "adamw" / "checkpoint-2" / "shards").glob("__*"))]
    values = sum(value.numel() for value in saved[1]["adamw"].values() if isinstance(value, Tensor))
    assert len(sizes) == 2
    for size in sizes:
        assert 8 * values / 2 < size < 8 * values / 2 * 1.5 + 50_000  # with headers


def test_damaged_shards_are_noticed(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for damage in ("changed", "removed"):
        folder = tmp_path / damage / "checkpoint-2"
        shutil.copytree(saved[0] / "sgd" / "checkpoint-2", folder)
        file = folder / "shards" / "__1_0.distcp"
        if damage == "removed":
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        with pytest.raises(InvalidArgument, match=r"__1_0\.distcp is"):
            load_checkpoint(folder)


def test_a_checkpoint_of_another_model_is_refused(saved: tuple[Path, dict[str, Any]]) -> None:
    model = whole_model("GPT-2")
    optimizer = OPTIMIZERS["sgd"](trainable_parameters(model))
    with pytest.raises(RuntimeError, match=r"of another model: it has .* not at all"):
        put_back(load_checkpoint(saved[0] / "sgd" / "checkpoint-2"), model, optimizer)


def _with_full_disk(rank: int, gather: Gather, folder: Path) -> str:
    """One rank's disk is full while it writes its shards."""

    def write_data(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = stepped("sgd", sharded=True)
    if rank == 1:
        FileSystemWriter.write_data = write_data  # type: ignore[method-assign,assignment]
    try:
        save(model, optimizer, folder, _ranks(rank, gather))
    except (InvalidArgument, OSError) as error:
        return str(error)
    return ""


def test_a_full_disk_on_any_rank_leaves_no_checkpoint(tmp_path: Path) -> None:
    first, second = run_processes(2, _with_full_disk, tmp_path)
    assert "could not be written (No space left on device); free space" in first
    assert "No space left" in second
    assert list(tmp_path.iterdir()) == []


def _given_up(rank: int, gather: Gather, folder: Path) -> str:
    """Rank 0 cannot even make the folder."""
    model, optimizer = stepped("sgd", sharded=True)
    try:
        save(model, optimizer, folder / "missing", _ranks(rank, gather))
    except InvalidArgument as error:
        return str(error)
    return "went on"


def test_other_ranks_go_on_if_rank_0_writes_nothing(tmp_path: Path) -> None:
    first, second = run_processes(2, _given_up, tmp_path)
    assert "could not be written" in first
    assert second == "went on"
