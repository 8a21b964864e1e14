"""A made-up rule of the planner, so that tests do not depend on what was measured, and noise that is found at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from utils.planning import search
from utils.planning.rule import Rule

RULE = Rule(
    source="made-up runs",
    data="none",
    parameters=20_000,
    whole=True,
    start=5.0,
    floor=1.5,
    learn=8.0,
    alpha=0.5,
    noise=60.0,
    beta=-0.2,
    gamma=0.8,
    rate=(2e-2, 0.25, -0.1, 0.3),
    steps=(25, 400),
    ratios=(0.001, 0.1),
    bands=8,
    error=0.05,
)


def about_the_noise(*, target_epsilon: float, sampling_probability: float, steps: int, **_: object) -> float | None:
    """In place of `noise_if_any`: about the noise of many steps, in no time; None for tiny epsilons."""
    return 0.4 + 5 * sampling_probability * math.sqrt(steps) / target_epsilon if target_epsilon > 1e-3 else None


@contextmanager
def quick_noise() -> Iterator[None]:
    """Make the planner's search quick and rough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "noise_if_any", about_the_noise)
        search.quietest.cache_clear()
        yield
    search.quietest.cache_clear()
