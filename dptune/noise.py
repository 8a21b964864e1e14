"""Standard Gaussian noise from a cryptographic keystream.

The noise of an adapter is prepared one step ahead in a background thread. The noise of a whole model would take as much
memory as the gradient, so it is made in parts when it is needed.

Box-Muller in float64 gives values up to 12.2 standard deviations, because the smallest uniforms have 106 bits. A
Gaussian lies beyond with a probability of 6e-33 per pair of values: 1e-22 in 200 steps of 135 million parameters.

A noisy sum is rounded to a grid before anyone sees it (`dptune.grid`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dptune._validate import require_count
from dptune.keystream import BITS, Keystream

# Values made at a time. Their float64 scratch memory fits in a processor's cache. Below 32,768 pairs torch uses a
# single thread; more threads would compete with the training step for cores.
_CHUNK = (1 << 16) - 2
_AHEAD = 1 << 24  # maximum number of values prepared for the next step: 128 MB; more are made in parts, on demand
_AT_ONCE = 1 << 16  # values added at a time, so that the float64 copies on the device stay small
_SMALL = 1 << 33  # a uniform below this many units, one in a million, gets as many bits again


def standard_normals(keystream: Keystream, size: int) -> Tensor:
    """[size] independent N(0, 1) values in float64 (Box and Muller 1958)."""
    values = torch.empty(size, dtype=torch.float64)
    for part in values.split(_CHUNK):
        _fill(part, keystream.split(_words(part)))
    return values


def _standard_normals_by(threads: ThreadPoolExecutor, keystream: Keystream, size: int) -> Tensor:
    """The same values, made by several threads, each from its own part of the stream."""
    values = torch.empty(size, dtype=torch.float64)
    parts = values.split(_CHUNK)
    stretches = [keystream.split(_words(part)) for part in parts]
    for _ in threads.map(_fill, parts, stretches):
        pass  # raises the errors of the threads
    return values


def _fill(part: Tensor, keystream: Keystream) -> None:
    pairs = _pairs(part)
    radius = torch.from_numpy(_fine_uniforms(pairs, keystream)).log_().mul_(-2).sqrt_()
    angle = torch.from_numpy(keystream.uniforms(pairs)).mul_(2 * math.pi)
    part[:pairs] = angle.cos().mul_(radius)
    part[pairs:] = angle.sin_().mul_(radius)[: len(part) - pairs]


def _fine_uniforms(count: int, keystream: Keystream) -> np.ndarray:
    """Uniform float64 values in (0, 1], from 53 bits, or 106 bits if they are small: they make the Gaussian's tail."""
    whole = keystream.integers(count)
    values = whole + 0.5
    if whole.min() < _SMALL:
        small = np.flatnonzero(whole < _SMALL)
        values[small] = whole[small] + (keystream.integers(len(small)) + 0.5) * 2.0**-BITS
    values *= 2.0**-BITS
    return values


def _pairs(part: Tensor) -> int:
    return (len(part) + 1) // 2


def _words(part: Tensor) -> int:
    """The most words of the keystream that `_fill` uses for `part`."""
    return 3 * _pairs(part)


class GaussianNoise:
    """Vectors of `size` new N(0, 1) values, each used once. Close it (or use `with`) to end its threads.

    Args:
        size: number of values per step.
        keystream: secret randomness, by default keyed from the operating system. Each rank needs its own.
    """

    def __init__(self, size: int, keystream: Keystream | None = None) -> None:
        require_count("size", size)
        self.size = size
        self.keystream = keystream or Keystream.from_os()
        # One thread in parallel with a training step, or all cores between two steps.
        workers = 1 if size <= _AHEAD else torch.get_num_threads()
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="dptune-noise")
        self._next = self._prepare()
        self._closed = False

    @property
    def source(self) -> str:
        """Where the noise comes from, in words for the report."""
        kind = "keyed from the operating system" if self.keystream.secret else "under a FIXED key (tests only)"
        return f"AES-256-CTR keystream {kind}, Box-Muller in float64, sums rounded to a grid"

    def add_to(self, sum_P: Tensor, std: float, *, grid: float) -> None:
        """Replace a sum by the multiple of `grid` next to (sum + noise), computed in float64, in place.

        If the sum's type cannot hold that multiple, it is rounded once more.

        Args:
            sum_P: float [size].
            std: standard deviation of the noise on each value.
            grid: a power of two that does not depend on the data, see `dptune.grid`.

        Raises:
            RuntimeError: there are not as many noise values as sums. The sum is then not fit for release.
        """
        start = 0
        for values in self.parts():
            part = sum_P[start : start + len(values)]
            start += len(values)
            if len(part) == len(values):
                for own, more in zip(part.split(_AT_ONCE), values.split(_AT_ONCE), strict=True):
                    noisy = more.to(sum_P.device).mul_(std / grid).add_(own, alpha=1 / grid)
                    own.copy_(noisy.round_().mul_(grid))
        if start != len(sum_P):
            raise RuntimeError(f"there are {start} noise values for {len(sum_P)} sums: this step cannot be released")

    def parts(self) -> Iterator[Tensor]:
        """The next vector, float64 on the CPU, in parts that are [size] together.

        Take all of them; otherwise the next step gets the values that are left.

        Raises:
            RuntimeError: the source is closed, or it is another process's.
        """
        self.keystream.require_own_process()  # prepared values are the same in a forked process
        for start in range(0, self.size, _AHEAD):
            yield self._part(min(_AHEAD, self.size - start))

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

    def _part(self, size: int) -> Tensor:
        if self._closed:
            raise RuntimeError("this GaussianNoise is closed: make a new one")
        if self._next is None:
            return _standard_normals_by(self._threads, self.keystream, size)
        values = self._next.result()
        self._next = self._prepare()
        return values

    def _prepare(self) -> Future[Tensor] | None:
        if self.size > _AHEAD:
            return None
        return self._threads.submit(standard_normals, self.keystream, self.size)
