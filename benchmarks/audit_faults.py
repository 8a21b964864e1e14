"""Faults that break privacy in silence, planted into the engine of this process, to see that an audit finds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dptune import clipping, mechanism, noise, sampling
from dptune.keystream import KEY_BYTES
from dptune.per_example import Recorded
from dptune.run import session
from dptune.sampling import checksum_of_items
from dptune.step_sums import WholeSum

_KEY = bytes(KEY_BYTES)
_KEPT = 64  # values without noise


def less_noise(factor: float) -> AbstractContextManager[Any]:
    """All noise multiplied by a factor."""
    honest = noise.GaussianNoise.add_to

    def add_to(self: noise.GaussianNoise, sum_P: Tensor, std: float, *, grid: float) -> None:
        honest(self, sum_P, std * factor, grid=grid)

    return patch.object(noise.GaussianNoise, "add_to", add_to)


def noise_over_ranks() -> AbstractContextManager[Any]:
    """Each rank's noise divided by the number of ranks instead of its root."""
    honest = mechanism.PrivacyConfig.noise_std_per_rank

    def per_rank(self: mechanism.PrivacyConfig, world_size: int, clip_norm: float | None = None) -> float:
        return honest(self, world_size, clip_norm) / math.sqrt(world_size)

    return patch.object(mechanism.PrivacyConfig, "noise_std_per_rank", per_rank)


def clips_to_twice() -> AbstractContextManager[Any]:
    """Contributions of norm 2 C."""
    honest = clipping.clip_factors
    return patch.object(clipping, "clip_factors", lambda norms_B, clip_norm: honest(norms_B, 2 * clip_norm))


def layer_not_measured() -> AbstractContextManager[Any]:
    """A layer that is summed, but missing in the norm."""
    honest = Recorded.squared_norms

    def squared_norms(self: Recorded, groups: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        named = {name: "missing" if ".linear." in name else group for name, group in (groups or {}).items()}
        return {group: own for group, own in honest(self, named).items() if group != "missing"}

    return patch.object(Recorded, "squared_norms", squared_norms)


def counts_twice() -> AbstractContextManager[Any]:
    """Every row added twice."""
    honest = WholeSum.add

    def add(self: WholeSum, recorded: Recorded, weights: Mapping[str, Tensor]) -> None:
        honest(self, recorded, {name: 2 * own for name, own in weights.items()})

    return patch.object(WholeSum, "add", add)


def _other_parts(change: Callable[[noise.GaussianNoise, Tensor], Tensor]) -> AbstractContextManager[Any]:
    """The noise of a step, changed."""
    honest = noise.GaussianNoise.parts

    def parts(self: noise.GaussianNoise) -> Iterator[Tensor]:
        yield change(self, torch.cat([part.clone() for part in honest(self)]))

    return patch.object(noise.GaussianNoise, "parts", parts)


def neighbours_share() -> AbstractContextManager[Any]:
    """Neighbouring coordinates with the same noise."""
    return _other_parts(lambda _, values: values[::2].repeat_interleave(2)[: len(values)])


def some_without() -> AbstractContextManager[Any]:
    """The first values without noise."""
    return _other_parts(lambda _, values: values * (torch.arange(len(values)) >= _KEPT))


def same_each_step() -> AbstractContextManager[Any]:
    """The first step's noise in every step."""

    def first(self: Any, values: Tensor) -> Tensor:
        if not hasattr(self, "first_values"):
            self.first_values = values
        kept: Tensor = self.first_values.clone()
        return kept

    return _other_parts(first)


def same_each_launch() -> AbstractContextManager[Any]:
    """Noise under a fixed key, on every rank and in every launch."""
    return patch.object(noise.Keystream, "from_os", classmethod(lambda cls: cls(_KEY, secret=True)))


def drawn_too_often(factor: float) -> AbstractContextManager[Any]:
    """A larger sampling probability than the stated one."""
    honest = sampling.PoissonSampler._pieces

    def pieces(self: sampling.PoissonSampler) -> Iterator[tuple[int, int, float]]:
        for start, count, probability in honest(self):
            yield start, count, min(1.0, factor * probability)

    return patch.object(sampling.PoissonSampler, "_pieces", pieces)


def same_draws_each_launch() -> AbstractContextManager[Any]:
    """Draws under a fixed key."""
    return patch.object(session, "new_key", lambda: _KEY)


def batches_of_one_size() -> AbstractContextManager[Any]:
    """Shuffled batches of a fixed size, accounted as Poisson draws."""

    def draw(self: sampling.PoissonSampler) -> np.ndarray:
        size = round(self.num_examples * self.sampling_probability)
        drawn = np.sort(np.argsort(self.keystream.uniforms(self.num_examples))[:size]).astype(np.int64)
        self._unused.append((size, checksum_of_items(drawn)))
        return drawn

    return patch.object(sampling.PoissonSampler, "draw", draw)


# {what is wrong: (the fault, ranks that show it, whether only draws with q < 1 show it)}
FAULTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], int, bool]] = {
    "no noise": (lambda: less_noise(1e-6), 1, False),
    "half of the noise": (lambda: less_noise(1 / 2), 1, False),
    "a quarter of the noise": (lambda: less_noise(1 / 4), 1, False),
    "10% less noise": (lambda: less_noise(0.9), 1, False),
    "each rank's noise over the ranks, not their root": (noise_over_ranks, 2, False),
    "clips to 2 C": (clips_to_twice, 1, False),
    "a layer missing in the norm": (layer_not_measured, 1, False),
    "rows counted twice": (counts_twice, 1, False),
    "neighbouring coordinates share noise": (neighbours_share, 1, False),
    "some coordinates without noise": (some_without, 1, False),
    "the same noise in each step": (same_each_step, 1, False),
    "the same noise in each launch": (same_each_launch, 1, False),
    "the same noise on each rank": (same_each_launch, 2, False),
    "rows drawn 1.5 times as often": (lambda: drawn_too_often(1.5), 1, True),
    "the same draws in each launch": (same_draws_each_launch, 1, True),
    "batches of one size": (batches_of_one_size, 1, True),
}
