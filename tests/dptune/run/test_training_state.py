"""Checkpoints of sharded weights: read on another number of ranks and without sharding, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dptune import InvalidArgument, trainable_parameters
from dptune.averaging import Averaging
from dptune.iterate_average import IterateAverage
from dptune.ranks import Ranks
from dptune.run.checkpoint import load_checkpoint
from dptune.run.training_state import put_back
from tests.processes import run_processes
from tests.saved_shards import OPTIMIZERS, Gather, assert_same, begun, contents, save, saved_by_two_ranks, stepped
from tests.whole_models import whole_model


def _loaded(_rank: int, _gather: Gather, folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for kind in OPTIMIZERS:
        model, optimizer = begun(kind, sharded=True)
        put_back(load_checkpoint(folder / kind / "checkpoint-2"), model, optimizer)
        found[kind] = contents(model, optimizer)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder with the checkpoints of two ranks, and what they must hold."""
    folder = tmp_path_factory.mktemp("two ranks")
    return folder, saved_by_two_ranks(folder)


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


EMA = Averaging(ema=0.5)


def _average_of(_rank: int, _gather: Gather, folder: Path) -> dict[str, Tensor]:
    """The average that a rank with shards reads, whole."""
    model, optimizer = begun("sgd", sharded=True)
    average = IterateAverage(model, EMA, 2)
    put_back(load_checkpoint(folder / "checkpoint-2"), model, optimizer, average)
    assert average.count == 2
    return {name: tensor.full_tensor() for name, tensor in average.tensors.items()}  # type: ignore[attr-defined]


def test_ranks_with_shards_read_the_average_that_one_process_wrote_whole(tmp_path: Path) -> None:
    model, optimizer = stepped("sgd", sharded=False)
    average = IterateAverage(model, EMA, 2)
    for step in (1, 2):
        average.add(step)
        for parameter in model.parameters():
            parameter.data.mul_(2)
    save(model, optimizer, tmp_path, Ranks(), average)
    for found in run_processes(2, _average_of, tmp_path):
        assert_same(found, average.tensors)
    assert not torch.equal(average.tensors["model.norm.weight"], model.get_parameter("model.norm.weight"))


def test_a_checkpoint_without_the_average_is_refused(saved: tuple[Path, dict[str, Any]]) -> None:
    model, optimizer = begun("sgd", sharded=False)
    with pytest.raises(InvalidArgument, match="is over 0 steps, but with 9 planned steps it would be over 2"):
        put_back(load_checkpoint(saved[0] / "sgd" / "checkpoint-2"), model, optimizer, IterateAverage(model, EMA, 9))


def test_a_checkpoint_of_another_model_is_refused(saved: tuple[Path, dict[str, Any]]) -> None:
    model = whole_model("GPT-2")
    optimizer = OPTIMIZERS["sgd"](trainable_parameters(model))
    with pytest.raises(RuntimeError, match=r"of another model: it has .* not at all"):
        put_back(load_checkpoint(saved[0] / "sgd" / "checkpoint-2"), model, optimizer)
