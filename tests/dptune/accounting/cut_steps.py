"""One step with cut draws, by counting all draws: what its accounting is held against."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np


def sums_of_draws(gradients: Sequence[float], q: float, max_batch: int) -> dict[float, float]:
    """{sum of the drawn gradients: its probability}, over all draws and all subsets that a cut may leave."""
    found: defaultdict[float, float] = defaultdict(float)
    for size in range(len(gradients) + 1):
        for drawn in combinations(gradients, size):
            kept = list(combinations(drawn, min(size, max_batch)))
            for batch in kept:
                found[sum(batch)] += q**size * (1 - q) ** (len(gradients) - size) / len(kept)
    return dict(found)


def hockey_stick(first: Mapping[float, float], second: Mapping[float, float], sigma: float, eps: float) -> float:
    """Delta at `eps` between two such sums with noise, by integration: the mass of max(0, first - exp(eps) second)."""
    ends = [*first, *second]
    x, width = np.linspace(min(ends) - 12 * sigma, max(ends) + 12 * sigma, 20_001, retstep=True)

    def density(sums: Mapping[float, float]) -> np.ndarray:
        parts = [chance * np.exp(-0.5 * ((x - mean) / sigma) ** 2) for mean, chance in sums.items()]
        return np.asarray(np.sum(parts, axis=0) / (sigma * math.sqrt(2 * math.pi)))

    return float(np.maximum(density(first) - math.exp(eps) * density(second), 0).sum() * width)
