"""Standard Gaussian noise from a cryptographic keystream, prepared one step ahead in a background thread.

Box-Muller in float64 on 53-bit uniforms: the largest value it can give is 8.57 standard deviations, a truncation whose
total variation distance from the Gaussian (1e-17 a value) is far below any delta in use.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dptune._validate import require_count
from dptune.keystream import Keystream

_CHUNK = 1 << 18  # values made at a time: bounds the float64 scratch memory to a few MB


def standard_normals(keystream: Keystream, size: int) -> np.ndarray:
    """`size` independent N(0, 1) values, computed in float64 (Box and Muller 1958), returned in float32."""
    values = np.empty(size, dtype=np.float32)
    for start in range(0, size, _CHUNK):
        part = values[start : start + _CHUNK]
        pairs = (len(part) + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-keystream.uniforms(pairs)))  # 1 - u is in (0, 1]: the logarithm is finite
        angle = (2.0 * np.pi) * keystream.uniforms(pairs)
        part[:pairs] = radius * np.cos(angle)
        part[pairs:] = (radius * np.sin(angle))[: len(part) - pairs]
    return values


class GaussianNoise:
    """Vectors of `size` fresh N(0, 1) values, each used once; close it (or use `with`) to end its thread.

    Args:
        size: number of values a step.
        keystream: secret randomness, by default keyed from the operating system. Each rank needs its own.
    """

    def __init__(self, size: int, keystream: Keystream | None = None) -> None:
        require_count("size", size)
        self.size = size
        self.keystream = keystream or Keystream.from_os()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dptune-noise")
        self._next: Future[np.ndarray] = self._prepare()
        self._closed = False

    @property
    def source(self) -> str:
        """Where the noise comes from, for the report."""
        kind = "keyed from the operating system" if self.keystream.secret else "under a FIXED key (tests only)"
        return f"AES-256-CTR keystream {kind}, Box-Muller in float64"

    def take(self) -> Tensor:
        """The next vector, float32 on the CPU, shape [size]; starts preparing the one after it."""
        if self._closed:
            raise RuntimeError("this GaussianNoise is closed: make a new one")
        values = self._next.result()
        self._next = self._prepare()
        return torch.from_numpy(values)

    def close(self) -> None:
        """End the background thread."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> GaussianNoise:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> Future[np.ndarray]:
        return self._thread.submit(standard_normals, self.keystream, self.size)
