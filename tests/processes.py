"""Several real processes in one gloo group, forked from a server that has already imported everything."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = (
    "dp_accounting",
    "dptune",
    "tests.dptune.integrations.runs",
    "tests.examples",
    "tests.tiny",
    "tests.whole_models",
    "transformers",
    "utils.training.micro_batches",
    "utils.training.resume",
)  # what most tests import
_CONTEXT.set_forkserver_preload([*PRELOADED])
_TIMEOUT = 240.0


def run_processes(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """[work(rank, gather, *args) of every rank]. `work` is a function at the top of a module; results are pickled.

    Raises `AssertionError` with a process's traceback if one fails or does not end.
    """
    with TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_work, args=(Path(folder), rank, world_size, work, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_TIMEOUT)
        ended = [not process.is_alive() for process in processes]
        for process in processes:
            process.kill()
        for rank in range(world_size):
            failure = Path(folder, f"{rank}.txt")
            assert not failure.exists(), failure.read_text()
        assert all(ended), f"still running after {_TIMEOUT:.0f} s: {ended}"
        # Judged by their results, because gloo sometimes aborts a process at its exit.
        return [pickle.loads(Path(folder, f"{rank}.pkl").read_bytes()) for rank in range(world_size)]


def _work(folder: Path, rank: int, world_size: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
        result = work(rank, _gather, *args)
        (folder / f"{rank}.pkl").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def _gather(share: Tensor) -> Tensor:
    """What `accelerator.gather` does."""
    together = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(together, share.contiguous())
    return torch.cat(together)
