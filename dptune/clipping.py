"""Per-example norms -> clipping factors -> clipped sum (Abadi et al. 2016, algorithm 1).

Shapes: B examples, P all trainable parameters, flat. The norm is of the whole per-example gradient over all
parameters, and what is summed is what was measured: the same tensors, scaled, with no rounding in between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dptune._validate import require_positive

# How many squares are summed in float32 (error 2e-7) before float64 takes over. Summing 2 million of them in float32
# gave norms 3e-5 too small on a CPU, 20 million 1e-3: what is clipped by too small a norm is longer than the
# sensitivity says.
_BLOCK = 1 << 16


def per_example_norms(grads: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norms over all parameters together, [B] float64, of gradients [B, *shape] per parameter."""
    blocks = [block for grad in grads.values() for block in grad.flatten(1).split(_BLOCK, dim=1)]
    return torch.stack([torch.linalg.vector_norm(block, dim=1).double().square() for block in blocks]).sum(0).sqrt()


def clip_factors(norms_B: Tensor, clip_norm: float) -> Tensor:
    """min(1, clip_norm / norm), [B]; 0 for a norm that is not finite, so that no example can spoil the sum."""
    require_positive("clip_norm", clip_norm)
    factors = (clip_norm / norms_B.clamp_min(torch.finfo(norms_B.dtype).tiny)).clamp(max=1.0)
    return torch.where(norms_B.isfinite(), factors, torch.zeros_like(factors))


def add_clipped_sum(
    flat_P: Tensor, slices: Mapping[str, slice], grads: Mapping[str, Tensor], factors_B: Tensor
) -> None:
    """flat_P[slices[name]] += sum over b of factors_B[b] * grads[name][b], for every parameter in `grads`.

    An example whose factor is 0 is left out rather than multiplied: 0 * inf is not 0. All of it happens or nothing
    (memory runs out while sums are made, not while they are added), so that a micro-batch can be tried again.
    """
    keep = factors_B > 0
    every = bool(keep.all())
    sums: dict[str, Tensor] = {}
    for name, grad in grads.items():
        grad_BN = grad.flatten(1)
        weights = factors_B.to(grad.dtype)
        if not every:
            grad_BN, weights = grad_BN[keep], weights[keep]
        sums[name] = weights @ grad_BN
    for name, total in sums.items():
        flat_P[slices[name]].add_(total)
