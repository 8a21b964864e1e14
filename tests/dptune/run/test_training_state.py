"""Checkpoints of sharded weights: read on another number of ranks and without sharding, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dptune import trainable_parameters
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


def test_a_checkpoint_of_another_model_is_refused(saved: tuple[Path, dict[str, Any]]) -> None:
    model = whole_model("GPT-2")
    optimizer = OPTIMIZERS["sgd"](trainable_parameters(model))
    with pytest.raises(RuntimeError, match=r"of another model: it has .* not at all"):
        put_back(load_checkpoint(saved[0] / "sgd" / "checkpoint-2"), model, optimizer)
