"""What is accounted for. No torch in this file."""

from __future__ import annotations

from typing import NamedTuple


class Spend(NamedTuple):
    """`steps` releases of a Poisson-subsampled Gaussian mechanism with the same settings.

    Attributes:
        noise_multiplier: standard deviation of the noise, divided by the norm to which each example is clipped.
        sampling_probability: probability of each example, per step.
        steps: number of releases.
        group_size: maximum number of examples of one privacy unit. An example is whatever is sampled and clipped as
            one. If that is everything that an author contributes to a step, the group size is 1.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    group_size: int = 1
