"""Exact bytes of tensors that a piece of code allocates on the CPU, from torch's profiler.

Resident memory is exact enough only for models of gigabytes: caches and pages of the allocator hide small ones.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dptune import CausalLMLoss, Ledger, PrivacyConfig, PrivateStep

T = TypeVar("T")

_MEMORY_EVENT, _GATHER_EVENT, _EXCHANGE_EVENT = "[memory]", "gloo:all_gather", "gloo:all_to_all"


@dataclass(frozen=True)
class Allocated:
    """Bytes beyond those at the start: `peak` at any time and `left` at the end. `shares`: bytes of this process's own
    shares in all all-gathers, `exchanged`: bytes of its tensors in all exchanges (float32, by gloo)."""

    peak: int
    left: int
    shares: int
    exchanged: int = 0


@dataclass(frozen=True)
class MicroBatchMemory:
    """Bytes that the forward pass keeps for the backward pass, and the peak over forward, backward and clipping."""

    kept: int
    peak: int


def allocated(work: Callable[[], T]) -> tuple[T, Allocated]:
    """(what `work` returns, what it allocated). Earlier garbage is collected first, so that it does not count."""
    with (
        _no_garbage_collected(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler,
    ):
        result = work()
    recorded: Any = profiler.profiler
    events = recorded.kineto_results.events()
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == _MEMORY_EVENT]
    shares, exchanged = (_bytes_of(name, events) for name in (_GATHER_EVENT, _EXCHANGE_EVENT))
    now = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        now += change
        peak = max(peak, now)
    return result, Allocated(peak, now, shares, exchanged)


def _bytes_of(name: str, events: Sequence[Any]) -> int:
    """Bytes of the tensors, in float32, that this process gave to all collectives of one kind."""
    return sum(4 * prod(one.shapes()[0]) for one in events if one.name() == name)


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def private_step(model: nn.Module, folder: Path, **ranks: Any) -> PrivateStep:
    """A whole private step, with noise and ledger. The size of the data set does not affect memory."""
    config = PrivacyConfig(
        num_examples=100_000, expected_batch_size=64, steps=1000, clip_norm=1.0, noise_multiplier=1.0, delta=1e-7
    )
    return PrivateStep(model, config, ledger=Ledger(folder / "ledger.jsonl"), **ranks)


def micro_batch_memory(model: Any, examples: int, tokens: int) -> MicroBatchMemory:
    """Memory of one private micro-batch of `examples` x `tokens`, every token labelled."""
    ids = torch.randint(1, model.config.vocab_size, (examples, tokens))
    with TemporaryDirectory() as folder, private_step(model, Path(folder)) as step:
        losses = CausalLMLoss(model)

        def forward() -> Tensor:
            return losses(ids, ids)

        step.backward(forward())  # allocates what is made once and kept
        kept, forward_only = allocated(forward)
        del kept
        _, both = allocated(lambda: step.backward(forward()))
    return MicroBatchMemory(forward_only.left, both.peak)
