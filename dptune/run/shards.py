"""The part of a checkpoint that all ranks write together: weights and optimizer states that are sharded over them.

It is a folder of `torch.distributed.checkpoint`. Each rank writes its own shards, so no rank ever holds the whole
model. Another number of ranks can read it, or one process without sharding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dptune._files import sync_folder
from dptune.ranks import Ranks

SHARDS_NAME = "shards"  # the folder inside a checkpoint

Entries = dict[str, dict[str, Any]]  # {file below the checkpoint: {"size": bytes, "sha256": hex}}


class Shards:
    """Writes one checkpoint's sharded tensors. Every rank makes one: rank 0 calls `write`, the others `help`.

    Args:
        tensors: {name: tensor}, the same names on every rank. Of a sharded tensor each rank writes its shard.
        ranks: the processes of the run.
    """

    def __init__(self, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        self._tensors, self._ranks = {name: tensor.detach() for name, tensor in tensors.items()}, ranks
        self._is_open = True

    def write(self, folder: Path) -> Entries:
        """Write all shards below a checkpoint's folder, which must exist. Rank 0 only.

        Returns:
            The size and the hash of every file.

        Raises:
            OSError: a rank could not write its files.
        """
        return self._write(folder)

    def help(self) -> None:
        """Write this rank's shards where rank 0 says; nothing if rank 0 gave up. Every rank but 0."""
        self._write(None)

    def give_up(self) -> None:
        """Tell the other ranks that nothing will be written, unless it was. Rank 0 only."""
        if self._is_open:
            self._told(None)

    def _told(self, folder: Path | None) -> Path | None:
        self._is_open = False
        if self._ranks.broadcast is None:
            return folder
        told = self._ranks.broadcast(None if folder is None else str(folder))
        return None if told is None else Path(str(told))

    def _write(self, folder: Path | None) -> Entries:
        target = self._told(folder)
        if target is None:
            return {}
        try:
            dcp.save(self._tensors, checkpoint_id=str(target / SHARDS_NAME))
        except CheckpointException as error:
            raise _cause_of(error) from None
        own = {path.name: _entry(path) for path in (target / SHARDS_NAME).glob(f"__{self._ranks.rank}_*")}
        parts: list[Entries] = [{}] * self._ranks.world_size
        dist.all_gather_object(parts, own)
        if self._ranks.is_main:
            own |= {".metadata": _entry(target / SHARDS_NAME / ".metadata")}
            sync_folder(target / SHARDS_NAME)
        return {f"{SHARDS_NAME}/{name}": entry for part in [*parts, own] for name, entry in part.items()}


def load_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded or whole, from a checkpoint's folder. With several processes, every rank must call it.

    Raises:
        RuntimeError: the checkpoint lacks a tensor, or has it in another shape.
    """
    stored = stored_shapes(folder)
    for name, tensor in tensors.items():
        if stored.get(name) != tuple(tensor.shape):
            found = f"as {stored[name]}" if name in stored else "not at all"
            raise RuntimeError(f"the checkpoint is of another model: it has {name} {found}")
    wanted = {name: tensor.detach() for name, tensor in tensors.items()}
    dcp.load(wanted, checkpoint_id=str(folder / SHARDS_NAME), no_dist=not dist.is_initialized())


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all tensors that `Shards` wrote into a checkpoint's folder."""
    stored = dcp.FileSystemReader(str(folder / SHARDS_NAME)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in stored.items() if hasattr(entry, "size")}


def _cause_of(error: CheckpointException) -> OSError:
    """The first error of any rank, as one of the operating system, which the caller explains."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError):
        return cause
    return OSError(f"rank {rank} failed: {type(cause).__name__}: {cause}")


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
