"""Standard Gaussian noise from a cryptographic keystream.

The noise of an adapter is prepared one step ahead in a background thread. The noise of a whole model would take as much
memory as the gradient, so it is made in parts when it is needed.

Box-Muller in float64 with 53-bit uniforms gives at most 8.57 standard deviations. The total variation distance of this
truncation from the Gaussian (1e-17 per value) is far below any delta in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from dptune._validate import require_count
from dptune.keystream import Keystream

# Values made at a time. Their float64 scratch memory fits in a processor's cache, and below 32,768 pairs torch uses a
# single thread; more threads would compete with the training step for cores.
_CHUNK = (1 << 16) - 2
_AHEAD = 1 << 24  # maximum number of values prepared for the next step: 64 MB; more are made in parts, on demand


def standard_normals(keystream: Keystream, size: int) -> Tensor:
    """[size] independent N(0, 1) values, computed in float64 (Box and Muller 1958), returned in float32."""
    values = torch.empty(size, dtype=torch.float32)
    for part in values.split(_CHUNK):
        _fill(part, keystream)
    return values


def _standard_normals_by(threads: ThreadPoolExecutor, keystream: Keystream, size: int) -> Tensor:
    """The same values, made by several threads, each from its own part of the stream."""
    values = torch.empty(size, dtype=torch.float32)
    parts = values.split(_CHUNK)
    stretches = [keystream.split(2 * _pairs(part)) for part in parts]
    for _ in threads.map(_fill, parts, stretches):
        pass  # raises the errors of the threads
    return values


def _fill(part: Tensor, keystream: Keystream) -> None:
    pairs = _pairs(part)
    # 1 - u is exact and in (0, 1], so the logarithm is finite.
    radius = torch.from_numpy(keystream.uniforms(pairs)).neg_().add_(1).log_().mul_(-2).sqrt_()
    angle = torch.from_numpy(keystream.uniforms(pairs)).mul_(2 * math.pi)
    part[:pairs] = angle.cos().mul_(radius)
    part[pairs:] = angle.sin_().mul_(radius)[: len(part) - pairs]


def _pairs(part: Tensor) -> int:
    return (len(part) + 1) // 2


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
        return f"AES-256-CTR keystream {kind}, Box-Muller in float64"

    def parts(self) -> Iterator[Tensor]:
        """The next vector, float32 on the CPU, in parts that are [size] together.

        Take all of them; otherwise the next step gets the values that are left.
        """
        for start in range(0, self.size, _AHEAD):
            yield self._part(min(_AHEAD, self.size - start))

    def take(self) -> Tensor:
        """The next vector in one piece, float32 [size] on the CPU."""
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
