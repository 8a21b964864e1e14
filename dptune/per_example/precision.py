"""True float32 precision for norms and sums of per-example gradients.

A training loop may use `torch.autocast`, and a process may allow TF32 or bfloat16 in matrix products of float32
tensors. That is fine for forward and backward passes, but a norm that is 0.4% too small clips to 1.004 C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_EXACT = "ieee"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' own precision inside the block, and restore all settings afterwards."""
    cpu: Any = torch.backends.mkldnn
    backends = (torch.backends.cuda.matmul, cpu.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = _EXACT
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
