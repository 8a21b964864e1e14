"""One private step on one or several real processes: measured and predicted memory and traffic of each.

The weights are random, saved once, and read as in a real run: with sharding, each process reads only its rows. Lengths
are those of real abstracts.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import lengths
from benchmarks.allocations import Allocated, allocated, private_step
from benchmarks.contenders import adamw
from benchmarks.models import TARGETS
from dptune import CausalLMLoss, add_lora, trainable_parameters
from dptune._validate import present
from dptune.ranks import bytes_sent
from dptune.shapes import Shape, Shapes, deal_in_shapes
from dptune.sharding import ShardedBytes, local_part, weight_bytes
from utils.cli.launch import Sharding
from utils.models.loading import checkpoint_activations
from utils.models.memory import MemorySettings, micro_batch_needs
from utils.models.sharded import decoder_layers, load_sharded_model
from utils.models.sizes import model_sizes
from utils.models.whole_memory import bytes_sent_whole, whole_needs, whole_sizes

CPU = torch.device("cpu")
_MEASURED = 3  # steps
_LARGE = 1e6  # expected rows per step of a large logical batch, whose micro-batches fill the token budget
_SECONDS = 600.0
_GRACE = 5.0  # seconds for the other processes to end after the first
# Forked from a process that has imported everything once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benchmarks.ranks"])


@dataclass(frozen=True)
class Job:
    """The run: a Llama shape, and a draw of real lengths cut at `block` and dealt by `token_budget`."""

    shape: dict[str, Any]
    block: int
    token_budget: int
    draw: int
    rank: int
    processes: int
    sharded: bool
    checkpointing: bool
    whole: bool = False  # train every parameter, instead of adapters

    def draw_lengths(self) -> np.ndarray:
        """Number of tokens of each example in the draw, the same in every process."""
        table = np.minimum([sum(one) for one in lengths.table("abstracts")], self.block)
        return np.random.default_rng(0).choice(table, self.draw)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank: `held` of the model's own weights, and over one logical step the `peak` of all tensors and
    those `sent` in a ring; both also as predicted."""

    held: ShardedBytes
    peak: int
    predicted_peak: int
    sent: int
    predicted_sent: int


def measure(job: Job) -> list[RankMemory]:
    """The measurement of every rank, each in a fresh process. Raises `RuntimeError` if one fails."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_weights(job, folder / "model")
        workers = [_CONTEXT.Process(target=_work, args=(job, rank, folder)) for rank in range(job.processes)]
        for worker in workers:
            worker.start()
        _wait(workers)
        # Check the results, not the exit status: a process group on CPUs may abort at exit, after its work is done.
        results = [folder / f"{rank}.pickle" for rank in range(job.processes)]
        if not all(result.exists() for result in results):
            raise RuntimeError(f"{job}: a process ended without a result; its error is above")
        return [pickle.loads(result.read_bytes()) for result in results]


def _wait(workers: Sequence[BaseProcess]) -> None:
    """Wait until all have ended. If one fails, end the others, which would wait for it."""
    deadline = time.monotonic() + _SECONDS
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        if any(worker.exitcode for worker in workers):
            break
        time.sleep(0.05)
    for worker in workers:
        worker.join(_GRACE)
        worker.kill()


def save_weights(job: Job, folder: Path) -> None:
    """Random weights, as a checkpoint of safetensors."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**job.shape), dtype=torch.float32).save_pretrained(folder)


def _work(job: Job, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.processes)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(measure_rank(job, rank, folder)))
    dist.barrier()
    dist.destroy_process_group()


def measure_rank(job: Job, rank: int, folder: Path) -> RankMemory:
    """Load the model, take a step that makes the optimizer's state, and measure later ones.

    The profiler does not see what threads of the communication free. So what is held between steps is counted, and the
    smallest peak of several steps is taken.
    """
    model = _load(job, folder / "model")
    run = _Run(job, rank, model, folder)
    with run.private:
        run.step()
        steps = [run.measured_step() for _ in range(_MEASURED)]
    needs, sent = _predicted(job, model)
    exchanged = steps[0].exchanged * (job.processes - 1) // job.processes
    return RankMemory(
        held=_held(job, model),
        peak=run.held() + min(one.peak for one in steps),
        predicted_peak=needs,
        sent=steps[0].shares * (job.processes - 1) + exchanged,
        predicted_sent=sent,
    )


class _Run:
    """The adapters' optimizer, and steps over one draw."""

    def __init__(self, job: Job, rank: int, model: Any, folder: Path) -> None:
        self._model, self._losses = model, CausalLMLoss(model)
        self._optimizer = adamw(trainable_parameters(model))  # before the private step, which freezes them
        self._shapes = [shape if len(shares[rank]) else Shape(1, shape.width) for shape, shares in _dealt(job)]
        ranks = {"gather": _gather, "rank": rank, "world_size": job.processes}
        self.private = private_step(model, folder, **ranks)
        self._vocabulary = job.shape["vocab_size"]

    def held(self) -> int:
        """Bytes of weights and moments on this rank, without the last gradient, which a step drops as it begins."""
        moments = [value for state in self._optimizer.state.values() for value in state.values()]
        tensors = [*self._model.parameters(), *filter(torch.is_tensor, moments)]
        return sum(local_part(tensor).untyped_storage().nbytes() for tensor in tensors)

    def measured_step(self) -> Allocated:
        """What a step allocates, once the last gradient is gone."""
        self._optimizer.zero_grad()
        return allocated(self.step)[1]

    def step(self) -> None:
        for shape in self._shapes:
            ids = torch.randint(1, self._vocabulary, (shape.items, shape.width))
            self.private.backward(self._losses(ids, ids))
        self.private.finish()
        self._optimizer.step()


def _load(job: Job, folder: Path) -> Any:
    torch.manual_seed(0)
    if job.sharded:
        model = load_sharded_model(str(folder), dtype=torch.float32, device=CPU, sharding=Sharding())
    else:  # made here, because weights mapped from a file would not count as memory
        model = AutoModelForCausalLM.from_config(LlamaConfig(**job.shape), dtype=torch.float32)
    if job.whole:
        model.requires_grad_(True)
    else:
        add_lora(model, rank=job.rank, targets=TARGETS)
    if job.checkpointing:
        checkpoint_activations(model)
    return model.train()


def _held(job: Job, model: Any) -> ShardedBytes:
    if job.sharded or not job.whole:
        return weight_bytes(model, decoder_layers(model))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return ShardedBytes(size, size, size)


def _predicted(job: Job, model: Any) -> tuple[int, int]:
    """(peak, bytes sent) of one rank."""
    settings = MemorySettings(
        torch.float32,
        job.token_budget,
        job.block,
        checkpointing=job.checkpointing,
        world_size=job.processes,
        sharded=job.sharded,
        drawn=_LARGE,
        chunk_tokens=64,
    )
    micro_batches = len(_dealt(job))
    ran = {(shape.items, shape.items * shape.width) for shape, _ in _dealt(job)}
    if job.whole:
        whole = present(whole_sizes(model), "size of the model")
        sent = bytes_sent(whole.parameters, world_size=job.processes)
        if job.sharded:
            sent = bytes_sent_whole(whole, job.processes, micro_batches)
        return max(whole_needs(whole, settings, *size).total for size in ran), sent
    sizes = present(model_sizes(model), "size of the model")
    sent = bytes_sent(sizes.trained, world_size=job.processes)
    if job.sharded:
        # A micro-batch gathers every layer twice, forward and backward, and the root group once.
        gathered = 4 * (2 * (sizes.frozen - sizes.root) + sizes.root)
        sent += micro_batches * gathered * (job.processes - 1) // job.processes
    return max(micro_batch_needs(sizes, settings, *size).total for size in ran), sent


def _dealt(job: Job) -> list[tuple[Shape, list[np.ndarray]]]:
    shapes = Shapes(job.block, job.token_budget, _LARGE)
    return deal_in_shapes(np.arange(job.draw), job.draw_lengths(), shapes, ranks=job.processes)


def _gather(share: Tensor) -> Tensor:
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share)
    return torch.cat(shares)
