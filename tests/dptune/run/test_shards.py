"""The part of a checkpoint that all ranks write: each its own, whole or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dptune import InvalidArgument
from dptune.run.checkpoint import load_checkpoint
from tests.processes import run_processes
from tests.saved_shards import Gather, ranks_of_group, save, saved_by_two_ranks, stepped


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder with the checkpoints of two ranks, and what they must hold."""
    folder = tmp_path_factory.mktemp("two ranks")
    return folder, saved_by_two_ranks(folder)


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


def _with_full_disk(rank: int, gather: Gather, folder: Path) -> str:
    """One rank's disk is full while it writes its shards."""

    def write_data(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = stepped("sgd", sharded=True)
    if rank == 1:
        FileSystemWriter.write_data = write_data  # type: ignore[method-assign,assignment]
    try:
        save(model, optimizer, folder, ranks_of_group(rank, gather))
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
        save(model, optimizer, folder / "missing", ranks_of_group(rank, gather))
    except InvalidArgument as error:
        return str(error)
    return "went on"


def test_other_ranks_go_on_if_rank_0_writes_nothing(tmp_path: Path) -> None:
    first, second = run_processes(2, _given_up, tmp_path)
    assert "could not be written" in first
    assert second == "went on"
