"""A run before it starts: how it samples, how many steps it takes, its noise and its epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from dptune import accounting
from dptune._validate import InvalidArgument, refuse, require_delta
from dptune.accounting import Spend
from dptune.accounting.delta import default_delta
from dptune.bands import best_bands
from dptune.clipping_styles import PerLayer
from dptune.mechanism import PrivacyConfig, cut_of, require_bands, require_max_batch, sampling_probability
from dptune.run.settings import AUTO, PrivacySettings
from dptune.sampling import Parts
from dptune.units.unit import PrivacyUnit, Unit

ROW = PrivacyUnit()


@dataclass(frozen=True)
class RunPlan:
    """How a run samples and how many steps it takes.

    Attributes:
        privacy: the mechanism; None without privacy.
        num_examples: size of the training set: rows, items or authors, whichever are sampled.
        expected_batch_size: how many of them one step draws on average, over all processes.
        steps: number of logical steps.
        unit: whose presence is hidden, and how; known without privacy too.
        target_epsilon: the epsilon that the run must not exceed; None if the noise was given.
        test_seed: makes draws, masks and noise repeatable. For tests only: a run with it protects nobody.
        parts: parts of the training set whose rows are drawn more or less often; None if all are drawn alike.
        chose_delta: whether delta is the default for the number of examples.
        max_batch: the limit on how many one step draws, over all processes; None without one.
        register: see `PrivacySettings`.

    Raises:
        InvalidArgument: the plan contradicts its mechanism, from which epsilon is computed.
    """

    privacy: PrivacyConfig | None
    num_examples: int
    expected_batch_size: float
    steps: int
    unit: Unit = ROW
    target_epsilon: float | None = None
    test_seed: int | None = None
    parts: Parts | None = None
    chose_delta: bool = False
    max_batch: int | None = None
    register: str | None = None

    def __post_init__(self) -> None:
        if self.privacy is None:
            require_max_batch(self.max_batch, self.expected_batch_size, self.unit.group_size, self.parts)
            return
        planned = {"group_size": self.unit.group_size}
        planned |= {
            name: getattr(self, name) for name in ("num_examples", "expected_batch_size", "steps", "parts", "max_batch")
        }
        for name, value in planned.items():
            if value != (accounted := getattr(self.privacy, name)):
                refuse(
                    name, value, f"the mechanism has {accounted}, which epsilon is computed from; give both the same"
                )

    @property
    def sampling_probability(self) -> float:
        """q, the probability that one step draws a given example (or author); with weights, one of the largest."""
        return sampling_probability(self.expected_batch_size, self.num_examples, self.parts)

    @property
    def noise_bands(self) -> int:
        """The number of noise bands; 1 for independent noise, and without privacy."""
        return 1 if self.privacy is None else self.privacy.noise_bands

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each example is drawn once on average, rounded up."""
        return math.ceil(self.num_examples / self.expected_batch_size)


def make_plan(
    settings: PrivacySettings | None,
    *,
    num_examples: int,
    batch: float,
    steps: int,
    unit: Unit = ROW,
    test_seed: int | None = None,
    parts: Parts | None = None,
    max_batch: int | None = None,
) -> RunPlan:
    """Find the noise and make the plan.

    Args:
        settings: the privacy settings; None for a run without privacy.
        num_examples, steps, unit, test_seed, parts, max_batch: see `RunPlan`.
        batch: the expected batch size.

    Raises:
        InvalidArgument: a delta of 1/n or more, a target epsilon that no useful noise reaches, or parts of rows that
            are not units by themselves.
    """
    if parts is not None and (unit.group_size > 1 or unit.sampled != ROW.sampled):
        refuse("parts", parts.sizes, "the rows of one unit may lie in several parts; leave the weights out")
    plain = RunPlan(None, num_examples, batch, steps, unit, test_seed=test_seed, parts=parts, max_batch=max_batch)
    return plain if settings is None else _with_privacy(plain, settings)


def _with_privacy(plan: RunPlan, settings: PrivacySettings) -> RunPlan:
    """A plan without privacy, with the mechanism that the settings ask for."""
    delta = default_delta(plan.num_examples) if settings.delta is None else settings.delta
    require_delta(delta, plan.num_examples)
    known = replace(settings, delta=delta)
    bands = _noise_bands(plan, known)
    total = settings.clipping.total if isinstance(settings.clipping, PerLayer) else None
    config = PrivacyConfig(
        num_examples=plan.num_examples,
        expected_batch_size=plan.expected_batch_size,
        steps=plan.steps,
        clip_norm=settings.clip_norm if total is None else total,
        noise_multiplier=_sigma(plan, known, bands),
        delta=delta,
        group_size=plan.unit.group_size,
        clipping=settings.clipping,
        parts=plan.parts,
        max_batch=plan.max_batch,
        noise_bands=bands,
    )
    return replace(
        plan,
        privacy=config,
        target_epsilon=settings.target_epsilon,
        chose_delta=settings.delta is None,
        register=settings.register,
    )


def _sigma(plan: RunPlan, settings: PrivacySettings, bands: int) -> float:
    """The noise multiplier with so many noise bands; the settings have a delta."""
    unit, q = plan.unit, plan.sampling_probability
    require_bands(bands, q, plan.steps, unit.group_size, plan.parts, plan.max_batch)
    _, chance, turns, *_ = Spend(1.0, q, plan.steps).with_bands(bands)
    cut = cut_of(plan.max_batch, plan.num_examples)
    found = replace(settings, noise_bands=bands)
    return found.sigma(sampling_probability=chance, steps=turns, group_size=unit.group_size, cut=cut)


def _noise_bands(plan: RunPlan, settings: PrivacySettings) -> int:
    """The number of noise bands: the given one, or the one that makes the least noise."""
    if settings.noise_bands != AUTO:
        return settings.noise_bands
    plain = plan.unit.group_size == 1 and plan.parts is None and plan.max_batch is None
    most = min(plan.steps, settings.most_noise_bands) if plain else 1
    return _quietest(partial(_sigma, plan, settings), plan.sampling_probability, plan.steps, most)


def _quietest(sigma_of: Callable[[int], float], sampling_probability: float, steps: int, most: int) -> int:
    """The number of noise bands, 1 or another power of 2, that makes the least noise in the sums over steps.

    Args:
        sigma_of: the noise multiplier that a number of bands needs.
        sampling_probability: q.
        steps: number of steps.
        most: the largest number to compare.
    """
    counts = [1]
    while 2 * counts[-1] <= min(most, steps) and 2 * counts[-1] * sampling_probability <= 1:
        counts.append(2 * counts[-1])
    noise = {}
    for count in counts:
        try:
            noise[count] = sigma_of(count) * best_bands(count, steps).error(steps)
        except InvalidArgument as error:  # no useful noise reaches the target with so many
            if error.name != "target_epsilon":
                raise
    return min(noise, key=noise.__getitem__, default=1)


def expected_batch(
    *,
    per_device: int,
    gradient_accumulation_steps: int,
    world_size: int,
    num_examples: int,
    sampled: str,
    parts: Parts | None = None,
) -> int:
    """The average batch size that Hugging Face's settings mean: per device x processes x accumulation steps.

    Raises:
        InvalidArgument: a sampling probability would be above 1: the batch is larger than the number of examples, or
            with weights so large that the examples of the largest weight would be drawn more than always.
    """
    batch = per_device * gradient_accumulation_steps * world_size
    told = f"x {per_device} per device x {world_size} processes is a batch of {batch}"
    if batch > num_examples:
        remedy = f"more than the {num_examples} {sampled} there are (a sampling probability above 1); lower it"
        refuse("gradient_accumulation_steps", gradient_accumulation_steps, f"{told}, {remedy}")
    if parts is not None and batch > parts.effective_size:
        most = f"more than the {parts.effective_size:g} that these weights allow (a sampling probability above 1)"
        remedy = f"{most}; lower it, or give weights that are closer to each other"
        refuse("gradient_accumulation_steps", gradient_accumulation_steps, f"{told}, {remedy}")
    return batch


def last_step(plan: RunPlan, recorded: int, completed: int) -> int:
    """The step after which a run ends: the planned one, or an earlier one if the budget does not suffice.

    It does not if a crash threw away steps, which are repeated; or with noise bands, if launches end between two turns.

    Args:
        plan: the run's plan.
        recorded: turns in the ledger (`Ledger.turns`), including those of steps that a crash threw away.
        completed: steps that are part of the result so far.
    """
    config = plan.privacy
    if config is None or plan.target_epsilon is None:
        return plan.steps
    every, left = config.spend(plan.steps), config.spend(plan.steps - completed)
    if recorded + left.steps <= every.steps:
        return plan.steps
    affordable = accounting.max_steps(
        target_epsilon=plan.target_epsilon,
        delta=config.delta,
        noise_multiplier=every.noise_multiplier,
        sampling_probability=every.sampling_probability,
        at_least=every.steps,
        group_size=every.group_size,
        cut=every.cut,
    )
    return min(plan.steps, max(completed, completed + config.noise_bands * (affordable - recorded)))


def spends_to_come(plan: RunPlan, steps: int) -> list[Spend]:
    """What one launch of `steps` more steps of a run will spend; none without privacy."""
    if plan.privacy is None or not steps:
        return []
    return [plan.privacy.spend(steps)]
