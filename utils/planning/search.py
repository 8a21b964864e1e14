"""Compares batches for a computing budget: how many steps the time allows, their noise, and what the rule expects.

For each batch it tries several numbers of noise bands, and takes the one with the least noise in sums over steps. The
accounting is rough here: it states up to 5% more noise than a run needs. Results are cached, because the table and the
plot ask for the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dptune._validate import refuse
from dptune.accounting import Spend
from dptune.accounting.data_needed import Work, noise_if_any
from dptune.bands import MOST_BANDS
from dptune.mechanism import PrivacyConfig
from dptune.run.noise_ratios import noise_batch_ratio
from utils.planning.rule import Rule
from utils.planning.speed import Speed

ENOUGH = 0.5  # share of the gain without noise; with less, there are too few data for the epsilon


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The data, the time and the processes of a training.

    Attributes:
        num_examples: number of training rows.
        tokens_per_example: their average number of tokens.
        delta: the probability with which the bound may fail.
        seconds: how long the training may take.
        speed: how fast it goes.
        processes: a batch is a multiple of it.
        most_steps: the largest number of steps to propose, because the rule knows nothing of longer runs.
        most_bands: the largest number of noise bands to propose, see `dptune.bands.bands_within`.
    """

    num_examples: int
    tokens_per_example: float
    delta: float
    seconds: float
    speed: Speed
    processes: int = 1
    most_steps: int = 10_000
    most_bands: int = MOST_BANDS

    def steps(self, batch: int) -> int:
        """How many steps of a batch the time allows, at most `most_steps`."""
        return int(min(self.most_steps, self.seconds / self.speed.seconds(batch, self.tokens_per_example)))

    def hours(self, config: PrivacyConfig) -> float:
        """How long the steps of a mechanism take."""
        return config.steps * self.speed.seconds(config.expected_batch_size, self.tokens_per_example) / 3600

    def batches(self) -> list[int]:
        """The batches to compare: powers of 2 for each process, with time for a step.

        Of those that take `most_steps` in less time than there is, only the largest.

        Raises:
            InvalidArgument: there are fewer rows than processes, or there is no time for a step.
        """
        if self.processes > self.num_examples:
            refuse("num_examples", self.num_examples, f"give at least one for each of the {self.processes} processes")
        largest = int(math.log2(self.num_examples // self.processes))
        found = [one for power in range(largest + 1) if self.steps(one := self.processes << power)]
        if not found:
            took = self.speed.seconds(self.processes, self.tokens_per_example) / 3600
            refuse(
                "hours", f"{self.seconds / 3600:g}", f"one step takes {took:.2g} hours; give more time or more devices"
            )
        while len(found) > 1 and self.steps(found[1]) == self.most_steps:
            del found[0]
        return found


@lru_cache(maxsize=1024)
def quietest(limits: Limits, batch: int, target_epsilon: float) -> PrivacyConfig | None:
    """The mechanism with the least noise over the batch, for the steps that the time allows.

    The clip norm is 1. None if no useful noise reaches the target.
    """
    steps, found, bands, least = limits.steps(batch), None, 1, math.inf
    while bands <= min(limits.most_bands, steps) and bands * batch <= limits.num_examples:
        one = _with_bands(limits, batch, steps, bands, target_epsilon)
        if one is None or noise_batch_ratio(one) >= least:
            break
        found, least = one, noise_batch_ratio(one)
        bands *= 2
    return found


def _with_bands(limits: Limits, batch: int, steps: int, bands: int, target_epsilon: float) -> PrivacyConfig | None:
    spend = Spend(1.0, batch / limits.num_examples, steps).with_bands(bands)
    sigma = noise_if_any(
        target_epsilon=target_epsilon,
        delta=limits.delta,
        sampling_probability=spend.sampling_probability,
        steps=spend.steps,
        rough=True,
    )
    if sigma is None:
        return None
    return PrivacyConfig(
        num_examples=limits.num_examples,
        expected_batch_size=batch,
        steps=steps,
        clip_norm=1.0,
        noise_multiplier=sigma,
        delta=limits.delta,
        noise_bands=bands,
    )


def candidates(limits: Limits, target_epsilon: float) -> list[PrivacyConfig]:
    """A mechanism for each batch, the smallest batch first. Batches that need too much noise are left out.

    Raises:
        InvalidArgument: see `Limits.batches`; or no useful noise reaches the target with any batch.
    """
    found = [quietest(limits, batch, target_epsilon) for batch in limits.batches()]
    if not any(found):
        remedy = "no batch reaches it in that time with a useful amount of noise; give one from about 0.1 to 10"
        refuse("target_epsilon", target_epsilon, remedy)
    return [one for one in found if one is not None]


def best(options: Sequence[PrivacyConfig], rule: Rule) -> PrivacyConfig:
    """The mechanism with the least loss by the rule."""
    return min(options, key=lambda one: _loss(one, rule))


def search(limits: Limits, target_epsilon: float, rule: Rule) -> tuple[Limits, list[PrivacyConfig]]:
    """(the limits, with less time if a shorter run is better by the rule; the `candidates` for them).

    At a fixed epsilon more steps need more noise, so the best run may be shorter than the time allows. The time is
    halved as long as that lowers the loss of the best batch.
    """
    options = candidates(limits, target_epsilon)
    chosen = best(options, rule)
    shorter, batch = replace(limits, seconds=limits.seconds / 2), int(chosen.expected_batch_size)
    sooner = quietest(shorter, batch, target_epsilon) if 1 <= shorter.steps(batch) < chosen.steps else None
    if sooner is None or _loss(sooner, rule) >= _loss(chosen, rule):
        return limits, options
    return search(shorter, target_epsilon, rule)


def _loss(config: PrivacyConfig, rule: Rule) -> float:
    return rule.loss(config.steps, noise_batch_ratio(config))


def kept(config: PrivacyConfig | None, rule: Rule) -> float:
    """See `Rule.kept`; 0 where no useful noise reaches the target."""
    return 0.0 if config is None else rule.kept(config.steps, noise_batch_ratio(config))


def examples_needed(config: PrivacyConfig, rule: Rule, target_epsilon: float) -> int | None:
    """How many rows keep `ENOUGH` of what the same steps gain without noise, with this batch; None for too many."""
    ratio = rule.ratio_that_keeps(ENOUGH, config.steps)
    sigma = config.noise_multiplier * ratio / noise_batch_ratio(config)
    work = Work(
        batch=config.expected_batch_size, steps=config.steps, delta=config.delta, noise_bands=config.noise_bands
    )
    return work.examples(target_epsilon, sigma)
