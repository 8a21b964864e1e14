"""What a cut of Poisson draws costs: epsilon by maximal batch, and one step by counting all draws.

    python -m benchmarks.truncation --output benchmarks/results/NAME.md

It takes about a minute on a CPU. The first table has the bound that runs state, and that of dp-accounting for the same
draws. The second has small data sets, where the exact loss of one step is known: all other examples have the gradient
-1, and the one added or removed has 1. It is the loss of these gradients, so the bound must not be below it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from dp_accounting.pld.privacy_loss_distribution import from_truncated_subsampled_gaussian_mechanism
from scipy.stats import binom, norm

from benchmarks.tables import machine, markdown, publish
from dptune.accounting import Cut, Spend, compose
from dptune.accounting.distributions import one_step
from dptune.accounting.rounding import rounded_up_to_figures
from dptune.keystream import Keystream
from dptune.sampling import PoissonSampler

_DELTA, _DEVIATIONS = 1e-6, (1, 2, 3, 4, 5, 6)
_TRIALS, _INTERVAL = 20_000, 1e-3
_EPSILONS = (0.0, 0.5, 1.0, 2.0)


class Setting(NamedTuple):
    """A training: the noise multiplier, the number of examples, the expected batch size and the steps."""

    sigma: float
    num_examples: int
    batch: int
    steps: int


SETTINGS = (Setting(1.0, 67_349, 1024, 198), Setting(1.0, 10_000, 200, 500), Setting(2.0, 1000, 50, 100))
SMALL = ((0.9, 5, 4, 1.0), (0.5, 5, 3, 1.0), (1.0, 5, 5, 2.0), (0.3, 6, 3, 0.8))  # q, others, maximum, sigma


def costs(setting: Setting) -> Iterator[tuple[str, ...]]:
    """One line for plain draws, and one for each maximal batch."""
    sigma, n, batch, steps = setting
    q = batch / n
    plain = compose([Spend(sigma, q, steps)], delta=_DELTA)
    yield (f"{n:,} examples, batch {batch:,}, {steps} steps, sigma {sigma:g}", "-", "-", _up(plain), "1.00", "-")
    for times in _DEVIATIONS:
        most = math.ceil(batch + times * math.sqrt(batch * (1 - q)))
        cut = Cut(most, n)
        spent = compose([Spend(sigma, q, steps, 1, cut)], delta=_DELTA)
        library = from_truncated_subsampled_gaussian_mechanism(n + 1, q, most, sigma, _INTERVAL).self_compose(steps)
        theirs = library.get_epsilon_for_delta(_DELTA)
        chance = f"{cut.full_probability(q):.1e}"
        yield f"mean + {times} sd", f"{most:,}", chance, _up(spent), f"{spent / plain:.2f}", _up(theirs)


def _up(epsilon: float) -> str:
    return rounded_up_to_figures(epsilon, 4)


def sums_where_others_are_alike(others: int, q: float, most: int) -> tuple[dict[int, float], dict[int, float]]:
    """{sum: probability} of one cut draw (with the example, without it), if its gradient is 1 and all others' -1."""
    within: dict[int, float] = {}
    without: dict[int, float] = {}
    for drawn in range(others + 1):
        chance, kept = float(binom.pmf(drawn, others, q)), min(drawn, most)
        enters = q if drawn < most else q * most / (drawn + 1)
        without[-kept] = without.get(-kept, 0.0) + chance
        within[-kept] = within.get(-kept, 0.0) + chance * (1 - enters)
        moved = -kept + (1 if drawn < most else 2)
        within[moved] = within.get(moved, 0.0) + chance * enters
    return within, without


def density(sums: Mapping[int, float], sigma: float, x: np.ndarray) -> np.ndarray:
    """The density of a sum with noise."""
    return np.asarray(sum(chance * norm.pdf(x, mean, sigma) for mean, chance in sums.items()))


def small_cases() -> Iterator[tuple[str, ...]]:
    """One line for each small data set and epsilon: delta by counting, by real draws, as accounted, and if plain."""
    for q, others, most, sigma in SMALL:
        sums = sums_where_others_are_alike(others, q, most)
        x, width = np.linspace(-most - 14 * sigma, 2 + 14 * sigma, 40_001, retstep=True)
        within, without = (density(one, sigma, x) for one in sums)
        cut = one_step(Spend(sigma, q, 1, 1, Cut(most, others)), _INTERVAL)
        plain = one_step(Spend(sigma, q, 1), _INTERVAL)
        sampled = _released(others, q, most, sigma)
        ratio = density(sums[1], sigma, sampled) / density(sums[0], sigma, sampled)
        for eps in _EPSILONS:
            exact = np.maximum(within - math.exp(eps) * without, 0).sum() * width
            lost = np.maximum(1 - math.exp(eps) * ratio, 0)
            error = 2 * lost.std() / math.sqrt(len(lost))
            accounted, too_small = (
                max(one.get_delta_for_epsilon(eps), 0.0) for one in (cut._pmf_remove, plain._pmf_remove)
            )
            yield (
                f"q {q:g}, {others} others, cut at {most}, sigma {sigma:g}, epsilon {eps:g}",
                f"{exact:.4f}",
                f"{lost.mean():.4f} ± {error:.4f}",
                f"{accounted:.4f}",
                f"{too_small:.4f}{' (too small)' if too_small < exact else ''}",
            )


def _released(others: int, q: float, most: int, sigma: float) -> np.ndarray:
    """What steps of the real sampler release where the example is there, the last of the data set."""
    gradients = np.append(np.full(others, -1.0), 1.0)
    sampler = PoissonSampler(others + 1, q, Keystream.for_tests("benchmark"), max_batch=most)
    sums = np.array([gradients[sampler.draw()].sum() for _ in range(_TRIALS)])
    return sums + sigma * np.random.default_rng(0).normal(size=_TRIALS)


def main() -> None:
    """Make both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="Markdown file to write")
    given = parser.parse_args()
    bound = ["setting", "maximum", "P(full)", "epsilon", "of plain", "dp-accounting's"]
    exact = ["one step", "counted", "real draws", "accounted", "plain Poisson"]
    parts = [
        "# Poisson draws that are cut at a maximal batch",
        machine("benchmarks.truncation", torch.device("cpu"), sys.argv[1:]),
        f"## Epsilon at delta {_DELTA:g}",
        "P(full): the probability that one more example finds no room in a batch; sd: the standard\n"
        "deviation of the batch size. Epsilons are rounded up.",
        markdown(bound, [line for setting in SETTINGS for line in costs(setting)]),
        "## Delta of one step that removes an example",
        "Counted: the exact delta of gradients of -1 beside one of 1. Real draws: estimated from\n"
        f"{_TRIALS:,} steps of the sampler with noise, ± two standard errors.",
        markdown(exact, small_cases()),
    ]
    publish(parts, given.output)


if __name__ == "__main__":
    main()
