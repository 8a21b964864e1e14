"""Time and peak memory of contenders.

In each round every contender takes the same draw, in an order that rotates, so that a busy machine slows all of them
alike. A turn begins with a short step that does not count, because the caches are full of the last contender's memory.
Ratios are taken within a round. Memory is measured in a fresh process per contender, because a process keeps
memory that an earlier contender needed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.contenders import Contender
from benchmarks.lengths import Draw

T = TypeVar("T")

_PEAK_RESET = "5"  # what /proc/self/clear_refs takes to forget the peak (man 5 proc)


@dataclass(frozen=True)
class Memory:
    """Bytes before the first step (the model; on a CPU also Python and libraries), at the peak during steps, and before
    the model was loaded (`empty`: on a CPU Python and libraries, on a GPU nothing)."""

    before: int
    peak: int
    empty: int = 0

    @property
    def needed(self) -> int:
        """Bytes needed by the model and its training."""
        return self.peak - self.empty


def alternate(
    contenders: Sequence[Contender],
    draws: Sequence[Draw],
    *,
    warmup: int,
    warm_examples: int = 0,
    device: torch.device,
    max_seconds: float,
) -> dict[str, list[float]]:
    """Seconds of every contender's logical steps, one per round.

    Args:
        draws: one per round; the first `warmup` rounds do not count.
        warm_examples: examples of the step at the beginning of a turn that does not count; 0 for none.
        max_seconds: no round starts later than this, but at least one measured round is run.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    begin = time.perf_counter()
    for number, draw in enumerate(draws):
        if number > warmup and time.perf_counter() - begin > max_seconds:
            print(
                f"stopped after {number - warmup} of {len(draws) - warmup} rounds: --max_seconds",
                file=sys.stderr,
                flush=True,
            )
            break
        taken: dict[str, float] = {}
        turn = number % len(contenders)
        for contender in [*contenders[turn:], *contenders[:turn]]:
            if warm_examples:
                contender.step(draw[:warm_examples])
            taken[contender.name] = _seconds(contender, draw, device)
            if number >= warmup:
                seconds[contender.name].append(taken[contender.name])
        told = ", ".join(f"{name} {one:.3f} s" for name, one in taken.items())
        print(f"round {number + 1} of {len(draws)}: {told}", file=sys.stderr, flush=True)
    return seconds


def _seconds(contender: Contender, draw: Draw, device: torch.device) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    contender.step(draw)
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    """Wait for GPU kernels, which run asynchronously: otherwise only their launch is timed."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """`function(*args)` in a new Python process, which then ends."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory_now(device: torch.device) -> int:
    """Bytes in use."""
    _reset_peak(device)
    return peak(device)


def memory_of(contender: Contender, draws: Sequence[Draw], device: torch.device, *, empty: int = 0) -> Memory:
    """Peak memory over one logical step for each of `draws`; call it in the contender's own process.

    Args:
        empty: bytes in use before the model was loaded.
    """
    before = memory_now(device)
    for draw in draws:
        contender.step(draw)
    _wait_for(device)
    return Memory(before, peak(device), empty)


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.empty(1, device=device)  # a device that was not used yet counts nothing, and refuses the reset
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text(_PEAK_RESET)


def peak(device: torch.device) -> int:
    """Peak bytes since the reset: allocated on a GPU, resident on a CPU (without /proc, since the process started)."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
