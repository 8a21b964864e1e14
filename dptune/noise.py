"""Standard Gaussian noise from a cryptographic keystream.

Background threads make the noise in stretches. That of an adapter is made one step ahead. That of a whole model would
take twice as much memory as the gradient, so only some of it is ready before it is needed.

Box-Muller in float64 gives values up to 12.2 standard deviations, because the smallest uniforms have 106 bits. A
Gaussian lies beyond with a probability of 6e-33 per pair of values: 1e-22 in 200 steps of 135 million parameters.

A noisy sum is rounded to a grid before anyone sees it (`dptune.grid`).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dptune._validate import require_count
from dptune.keystream import BITS, Keystream, scratch_for

# Values made at a time. Their float64 scratch memory fits in a processor's cache. Below 32,768 pairs torch uses a
# single thread; more threads would compete for cores with the training step, and with those that make noise.
_CHUNK = (1 << 16) - 2
_STRETCH = 4 * _CHUNK  # values in one order to the threads: 2 MB, so small that memory is used again
_ADAPTER = 1 << 24  # maximum number of values that one thread makes a whole step ahead: 128 MB
_AHEAD = 1 << 28  # maximum number of values that are ready for an accelerator: 2 GB of the host's memory
_AT_ONCE = _CHUNK // 2  # values added at a time on a CPU, in its cache and by a single thread
_CPU = torch.device("cpu")
_SMALL = 1 << 33  # a uniform below this many units, one in a million, gets as many bits again


class _Scratch(threading.local):
    """Memory that each thread uses for every chunk. Fresh memory would take half of the time."""

    def __init__(self) -> None:
        self._pairs = 0

    def of(self, pairs: int) -> tuple[bytearray, np.ndarray, np.ndarray]:
        """(room for words, two float64 arrays), each for so many pairs."""
        if self._pairs != pairs:
            self._pairs, self._words = pairs, scratch_for(pairs)
            self._arrays = np.empty(pairs), np.empty(pairs)
        return self._words, *self._arrays


_scratch = _Scratch()


def standard_normals(keystream: Keystream, size: int) -> Tensor:
    """[size] independent N(0, 1) values in float64 (Box and Muller 1958)."""
    values = torch.empty(size, dtype=torch.float64)
    for part in values.split(_CHUNK):
        _fill(part, keystream.split(_words(len(part))))
    return values


def _fill(part: Tensor, keystream: Keystream) -> None:
    pairs = _pairs(len(part))
    words, first, second = _scratch.of(pairs)
    np.log(_fine_uniforms(keystream, words, out=first), out=first)
    radius = torch.from_numpy(np.sqrt(np.multiply(first, -2, out=first), out=first))
    whole = keystream.integers(pairs, scratch=words)
    angle = torch.from_numpy(np.multiply(whole, 2 * math.pi * 2.0**-BITS, out=second))
    ones, others = part[:pairs], part[pairs:]
    torch.cos(angle, out=ones).mul_(radius)
    torch.sin(angle[: len(others)], out=others).mul_(radius[: len(others)])


def _fine_uniforms(keystream: Keystream, words: bytearray, *, out: np.ndarray) -> np.ndarray:
    """Uniform float64 values in (0, 1], from 53 bits, or 106 bits if they are small: they make the Gaussian's tail."""
    whole = keystream.integers(len(out), scratch=words)
    np.add(whole, 0.5, out=out)
    if whole.min() < _SMALL:
        small = np.flatnonzero(whole < _SMALL)
        out[small] = whole[small] + (keystream.integers(len(small)) + 0.5) * 2.0**-BITS
    out *= 2.0**-BITS
    return out


def _pairs(size: int) -> int:
    return (size + 1) // 2


def _words(size: int) -> int:
    """The most words of the keystream that so many values use. Two threads' values must never share a word."""
    chunks, rest = divmod(size, _CHUNK)
    return 3 * (chunks * _pairs(_CHUNK) + _pairs(rest))


def add_noise(parts: Iterable[Tensor], sum_P: Tensor, std: float, *, grid: float) -> None:
    """Replace a sum by the multiple of `grid` next to (sum + noise), computed in float64, in place.

    If the sum's type cannot hold that multiple, it is rounded once more.

    Args:
        parts: the noise, float64 on the CPU, in parts that are [P] together; overwritten.
        sum_P: float [P].
        std: what the noise is multiplied by: the standard deviation of independent noise on each value.
        grid: a power of two that does not depend on the data, see `dptune.grid`.

    Raises:
        RuntimeError: there are not as many noise values as sums. The sum is then not fit for release.
    """
    start = 0
    for values in parts:
        part = sum_P[start : start + len(values)]
        start += len(values)
        if len(part) == len(values):
            at_once = _AT_ONCE if sum_P.device.type == "cpu" else len(values)
            for own, more in zip(part.split(at_once), values.split(at_once), strict=True):
                noisy = more.to(sum_P.device).mul_(std / grid).add_(own, alpha=1 / grid)
                own.copy_(noisy.round_().mul_(grid))
    if start != len(sum_P):
        raise RuntimeError(f"there are {start} noise values for {len(sum_P)} sums: this step cannot be released")


class GaussianNoise:
    """Vectors of `size` new N(0, 1) values, each used once. Close it (or use `with`) to end its threads.

    The key decides the values. How many threads make them, and when, does not.

    Attributes:
        relative_std: standard deviation of each of the last step's values.

    Args:
        size: number of values per step.
        keystream: secret randomness, by default keyed from the operating system. Each rank needs its own.
        device: where the sums are. An accelerator computes the step, so that the processor can make more of a whole
            model's noise meanwhile.
    """

    relative_std = 1.0

    def __init__(self, size: int, keystream: Keystream | None = None, *, device: torch.device = _CPU) -> None:
        require_count("size", size)
        self.size = size
        self.keystream = keystream or Keystream.from_os()
        self._sizes = [min(_STRETCH, size - start) for start in range(0, size, _STRETCH)]
        # One thread beside a training step on the same processor, or all cores between two steps.
        workers = 1 if size <= _ADAPTER else torch.get_num_threads()
        of_device = 2 * workers if device.type == "cpu" else _AHEAD // _STRETCH
        self._ready = len(self._sizes) if size <= _ADAPTER else min(len(self._sizes), of_device)
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="dptune-noise")
        self._closed = False
        self._orders = cycle(self._sizes)
        self._ordered: deque[Future[Tensor]] = deque()
        self._order()

    @property
    def source(self) -> str:
        """Where the noise comes from, in words for the report."""
        kind = "keyed from the operating system" if self.keystream.secret else "under a FIXED key (tests only)"
        return f"AES-256-CTR keystream {kind}, Box-Muller in float64, sums rounded to a grid"

    def add_to(self, sum_P: Tensor, std: float, *, grid: float) -> None:
        """See `add_noise`."""
        add_noise(self.parts(), sum_P, std, grid=grid)

    def parts(self) -> Iterator[Tensor]:
        """The next vector, float64 on the CPU, in parts that are [size] together.

        Take all of them; otherwise the next step gets the values that are left.

        Raises:
            RuntimeError: the source is closed, or it is another process's.
        """
        self.keystream.require_own_process()  # prepared values are the same in a forked process
        for _ in self._sizes:
            if self._closed:
                raise RuntimeError("this GaussianNoise is closed: make a new one")
            self._order()
            values = self._ordered.popleft().result()
            self._order()  # before the caller uses these, so that the threads work meanwhile
            yield values

    def take(self) -> Tensor:
        """The next vector in one piece, float64 [size] on the CPU."""
        return torch.cat(list(self.parts()))

    def close(self) -> None:
        """End the background threads."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> GaussianNoise:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order(self) -> None:
        """Let the threads make as many stretches as may be ready."""
        while len(self._ordered) < self._ready:
            size = next(self._orders)
            stretch = self.keystream.split(_words(size))
            self._ordered.append(self._threads.submit(standard_normals, stretch, size))
