"""What correlated noise gains: the noise in sums over steps, by the number of noise bands and epsilon.

    python -m benchmarks.noise_bands --output benchmarks/results/NAME.md

It takes minutes on a CPU and trains nothing. Each cell compares noise bands with independent noise at the same epsilon,
as a run's plan does: the root mean square, over all prefixes of the steps, of the standard deviation of the prefix's
noise sum. It also says by how much the noise of the last step is larger.

The last table compares the best bands with geometric ones, whose noise can be drawn again instead of kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.tables import machine, markdown, publish
from dptune.accounting.rounding import rounded_up
from dptune.bands import Bands, best_bands
from dptune.run.plan import make_plan
from dptune.run.settings import PrivacySettings

EPSILONS = (1.0, 2.0, 4.0, 8.0)
BANDS = (1, 2, 4, 8, 16)
GEOMETRIC_STEPS, GEOMETRIC_BANDS = (200, 1_000, 10_000), (2, 4, 8, 16, 32)


class Setting(NamedTuple):
    """A training: the number of examples, the expected batch size, the steps and delta."""

    num_examples: int
    batch: int
    steps: int
    delta: float


SETTINGS = (Setting(8_500, 256, 200, 1e-5), Setting(75_329, 2048, 184, 1e-7), Setting(67_349, 1024, 198, 1e-6))


def noises(setting: Setting, epsilon: float, bands: int) -> tuple[float, float]:
    """(the noise in sums over steps; that of the last step), each over the clip norm."""
    n, batch, steps, delta = setting
    settings = PrivacySettings(target_epsilon=epsilon, delta=delta, noise_bands=bands)
    config = make_plan(settings, num_examples=n, batch=batch, steps=steps).privacy
    if config is None:
        raise RuntimeError("a plan with a target epsilon has a mechanism")
    return config.noise_multiplier * config.bands.error(steps), config.noise_multiplier * config.bands.std(steps)


def lines(setting: Setting) -> Iterator[tuple[str, ...]]:
    """One line for each number of bands: for each epsilon, how sums and the last step compare with one band."""
    before = [noises(setting, epsilon, 1) for epsilon in EPSILONS]
    for bands in BANDS[1:]:
        found = [noises(setting, epsilon, bands) for epsilon in EPSILONS]
        cells = [
            f"{own[0] / one[0] - 1:+.0%} (x {own[1] / one[1]:.1f})" for own, one in zip(found, before, strict=True)
        ]
        yield (f"{bands}", *cells)


def geometric_bands(count: int, steps: int) -> Bands:
    """The bands 1, a, a^2, ... of length 1 whose a has the least error for so many steps.

    Their noise is the root of 1 + a^2 + ... times the sum over j of a^(b j) (z_(t - b j) - a z_(t - b j - 1)). So a key
    can draw again all that it is made of.
    """
    from scipy.optimize import minimize_scalar

    def bands(ratio: float) -> Bands:
        found = ratio ** np.arange(count)
        return Bands(tuple((found / np.linalg.norm(found)).tolist()))

    search = minimize_scalar(lambda ratio: bands(ratio).error(steps), bounds=(0.0, 1.0), method="bounded")
    return bands(float(search.x))


def geometric_lines() -> Iterator[tuple[str, ...]]:
    """One line for each number of steps: by how much the error of geometric bands is larger than that of the best."""
    for steps in GEOMETRIC_STEPS:
        ratios = [
            geometric_bands(bands, steps).error(steps) / best_bands(bands, steps).error(steps)
            for bands in GEOMETRIC_BANDS
        ]
        yield (f"{steps:,}", *(f"{ratio - 1:+.1%}" for ratio in ratios))


def main() -> None:
    """Make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="Markdown file to write")
    given = parser.parse_args()
    parts = [
        "# Noise that is correlated over steps",
        machine("benchmarks.noise_bands", torch.device("cpu"), sys.argv[1:]),
        "Noise in the sums over steps, compared with independent noise at the same epsilon. In\n"
        "brackets: how many times larger the noise of the last step is.",
    ]
    for setting in SETTINGS:
        n, batch, steps, delta = setting
        parts += [
            f"## {n:,} examples, batch {batch:,}, {steps} steps, delta {delta:g}",
            markdown(
                ["noise bands", *(f"epsilon {rounded_up(epsilon, trim=True)}" for epsilon in EPSILONS)], lines(setting)
            ),
        ]
    parts += [
        "## Noise that is drawn again instead of kept",
        "b bands keep b - 1 noises of the model's size. Geometric bands 1, a, a^2, ... need none: their\n"
        "noise is a sum of independent ones that a key can draw again, two for each b steps so far. The\n"
        "table says by how much their noise in sums over steps is larger than that of the best bands, at\n"
        "the same epsilon.\n\n"
        "DP-lambda-CGD ([Kalinin et al. 2026](https://arxiv.org/abs/2601.22334)) draws one noise again\n"
        "for each step. Its bands are geometric ones without an end. The proof for cyclic sampling\n"
        "(`dptune/correlated_noise.py`) needs turns of an example that share no row, so it does not hold\n"
        "there. Bands that end after b steps are the nearest mechanism that it certifies.",
        markdown(["steps", *(f"{bands} bands" for bands in GEOMETRIC_BANDS)], geometric_lines()),
    ]
    publish(parts, given.output)


if __name__ == "__main__":
    main()
