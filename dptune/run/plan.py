"""A run before it starts: how it samples, how many steps it takes, its noise and its epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from dptune import accounting
from dptune._validate import InvalidArgument, present, refuse, require_count, require_delta, require_positive
from dptune.accounting import USELESS_EPSILON, Cut, Spend
from dptune.accounting.data_needed import USUAL_EPSILONS, Work, describe_data_needed, noise_if_any
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.accounting.meaning import factor, log_odds, verdict
from dptune.accounting.rounding import rounded_up
from dptune.bands import INDEPENDENT, MOST_BANDS, best_bands
from dptune.budget import Budget
from dptune.clipping_styles import FLAT, Clipping, PerLayer, clipping_in_words
from dptune.ledger import LEDGER_NAME
from dptune.mechanism import PrivacyConfig, cut_of, require_bands, require_max_batch, sampling_probability
from dptune.sampling import Parts
from dptune.units.unit import PrivacyUnit, Unit

ROW = PrivacyUnit()
AUTO: Final = "auto"  # as many noise bands as make the least noise
_DROWNED = 10.0  # the update is then at best 6 degrees away from a right angle to what was learned


def noise_bands_of(given: str | int) -> int | Literal["auto"]:
    """The noise bands that a flag names.

    Raises:
        InvalidArgument: it is neither a whole number from 1 nor "auto".
    """
    if given == AUTO:
        return AUTO
    if not str(given).isdecimal() or int(given) < 1:
        refuse("noise_bands", given, f'give a whole number of at least 1, or "{AUTO}"')
    return int(given)


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """The user's settings that decide epsilon, in addition to the data set, the expected batch size and the steps.

    Attributes:
        clip_norm: C, the maximum gradient norm per example (or per author). Ignored if per-layer clip norms are given.
        noise_multiplier: sigma; None to find it from `target_epsilon`.
        target_epsilon: the maximum epsilon; None if `noise_multiplier` is given.
        delta: the probability with which the bound may fail; None for `default_delta` of the number of examples.
        clipping: the clipping style.
        register: file with a limit on all that is released from these data (`dptune.budget`); None for no limit.
        noise_bands: see `PrivacyConfig`; or "auto" for the number that makes the least noise at the target epsilon.
        most_noise_bands: the largest number that "auto" may choose, see `dptune.bands.bands_within`.

    Raises:
        InvalidArgument: both or neither of the noise multiplier and the target epsilon, a value outside its range, or
            automatic noise bands without a target.
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    clipping: Clipping = FLAT
    register: str | None = None
    noise_bands: int | Literal["auto"] = 1
    most_noise_bands: int = MOST_BANDS

    def __post_init__(self) -> None:
        if self.noise_multiplier is None and self.target_epsilon is None:
            refuse("noise_multiplier", None, "give exactly one of the noise multiplier and the target epsilon")
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            refuse("target_epsilon", self.target_epsilon, "give it or the noise multiplier, not both")
        require_positive("clip_norm", self.clip_norm)
        for name, value in (("noise_multiplier", self.noise_multiplier), ("target_epsilon", self.target_epsilon)):
            if value is not None:
                require_positive(name, value)
        if self.delta is not None:
            require_delta(self.delta)
        require_count("most_noise_bands", self.most_noise_bands)
        if self.noise_bands != AUTO:
            require_count("noise_bands", self.noise_bands)
        elif self.target_epsilon is None:
            refuse("noise_bands", AUTO, "is chosen for a target epsilon; give that, or a number of bands")

    def sigma(self, *, sampling_probability: float, steps: int, group_size: int, cut: Cut | None = None) -> float:
        """The noise multiplier: the given one, or the smallest that keeps epsilon at or below the target.

        For the arguments see `Spend`.
        """
        if self.target_epsilon is None:
            return self.noise_multiplier or refuse("noise_multiplier", self.noise_multiplier, "give a number above 0")
        return accounting.noise_multiplier(
            target_epsilon=self.target_epsilon,
            delta=present(self.delta, "delta"),
            sampling_probability=sampling_probability,
            steps=steps,
            group_size=group_size,
            cut=cut,
        )


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
    if settings is None:
        return RunPlan(None, num_examples, batch, steps, unit, test_seed=test_seed, parts=parts, max_batch=max_batch)
    require_max_batch(max_batch, batch, unit.group_size, parts)
    delta = default_delta(num_examples) if settings.delta is None else settings.delta
    require_delta(delta, num_examples)
    q = sampling_probability(batch, num_examples, parts)
    cut = cut_of(max_batch, num_examples)

    def sigma_of(bands: int) -> float:
        """The noise multiplier with so many noise bands."""
        require_bands(bands, q, steps, unit.group_size, parts, max_batch)
        _, chance, turns, *_ = Spend(1.0, q, steps).with_bands(bands)
        found = replace(settings, delta=delta, noise_bands=bands)
        return found.sigma(sampling_probability=chance, steps=turns, group_size=unit.group_size, cut=cut)

    bands = settings.noise_bands
    if bands == AUTO:
        plain = unit.group_size == 1 and parts is None and max_batch is None
        bands = _quietest(sigma_of, q, steps, settings.most_noise_bands if plain else 1)
    sigma = sigma_of(bands)
    total = settings.clipping.total if isinstance(settings.clipping, PerLayer) else None
    config = PrivacyConfig(
        num_examples=num_examples,
        expected_batch_size=batch,
        steps=steps,
        clip_norm=settings.clip_norm if total is None else total,
        noise_multiplier=sigma,
        delta=delta,
        group_size=unit.group_size,
        clipping=settings.clipping,
        parts=parts,
        max_batch=max_batch,
        noise_bands=bands,
    )
    return RunPlan(
        config,
        num_examples,
        batch,
        steps,
        unit,
        settings.target_epsilon,
        test_seed,
        parts,
        chose_delta=settings.delta is None,
        max_batch=max_batch,
        register=settings.register,
    )


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


def describe_register(plan: RunPlan, run_folder: str | Path, *, resumes: bool = False) -> list[str]:
    """A line about the room that the run's register leaves for all its planned steps; none without a register.

    Args:
        plan: the plan.
        run_folder: the run's folder.
        resumes: whether the run resumes.

    Raises:
        InvalidArgument: the run would exceed the register's limit, see `Budget.reserve`.
    """
    if plan.register is None:
        return []
    budget, ledger = Budget.register(plan.register), Path(run_folder) / LEDGER_NAME
    limit = present(budget.limit, "limit")
    total = budget.require_room(ledger, spends_to_come(plan, plan.steps), unit=plan.unit.name, resumes=resumes)
    of = f"{rounded_up(total)} of {rounded_up(limit.epsilon, trim=True)} at delta {limit.delta:g}"
    return [f"register               {plan.register}: epsilon {of}, this run included"]


def describe_plan(plan: RunPlan, *, clip_norm: str | None = None) -> list[str]:
    """The plan as lines of text for the user.

    Args:
        plan: the plan.
        clip_norm: what to say of a clip norm that is still to be measured; None for that of the plan.
    """
    sampled, unit = plan.unit.sampled, plan.unit
    lines = [
        f"{sampled:<22} {plan.num_examples:,}",
        f"expected batch size    {plan.expected_batch_size:,}{'' if sampled == 'examples' else f' {sampled}'}",
        f"sampling probability   {plan.sampling_probability:.6g}{'' if plan.parts is None else ', the largest'}",
        *([] if plan.parts is None else [f"weights                {plan.parts.in_words}"]),
        *([] if plan.max_batch is None else [f"draws cut at           {plan.max_batch:,} {sampled}"]),
        f"steps                  {plan.steps:,}",
    ]
    if plan.privacy is None:
        return [*lines, "privacy                NONE: clipping and noise are turned off"]
    if unit != ROW:
        lines += [f"privacy unit           {unit.name}", f"method                 {unit.how}"]
    epsilon = plan.privacy.planned_epsilon()
    useless = f"epsilon is above {USELESS_EPSILON:g}: this protects nobody; use it only to see whether training works"
    words = clipping_in_words(plan.privacy.clipping)
    style = [] if plan.privacy.clipping == FLAT else [f"clipping               {words}"]
    return [
        *lines,
        f"clip norm              {clip_norm or f'{plan.privacy.clip_norm:g}'}",
        *style,
        f"noise multiplier       {plan.privacy.noise_multiplier:g}",
        *_describe_bands(plan.privacy, plan.target_epsilon),
        f"epsilon                {rounded_up(epsilon)} at delta {plan.privacy.delta:g}",
        *([f"{'':<23}{delta_in_words(plan.num_examples, sampled)}"] if plan.chose_delta else []),
        f"too little noise       {useless}" if epsilon > USELESS_EPSILON else _meaning(epsilon, plan.privacy.delta),
    ]


def _describe_bands(config: PrivacyConfig, target_epsilon: float | None) -> list[str]:
    """What correlated noise does, as lines of text; none for independent noise."""
    if config.noise_bands == 1:
        return []
    own = config.noise_multiplier * config.bands.error(config.steps)
    sigma = noise_if_any(
        target_epsilon=config.planned_epsilon() if target_epsilon is None else target_epsilon,
        delta=config.delta,
        sampling_probability=config.sampling_probability,
        steps=config.steps,
    )
    if sigma is None:
        return [f"noise bands            {config.noise_bands}"]
    share = own / (sigma * INDEPENDENT.error(config.steps)) - 1
    told = f"{abs(share):.0%} {'less' if share < 0 else 'MORE'} noise in the sums over steps"
    more = config.noise_multiplier * config.bands.std(config.steps) / sigma
    return [
        f"noise bands            {config.noise_bands}: {told} than independent noise for this epsilon",
        f"{'':<23}a step's own noise is {more:.1f} times that much; AdamW and SGD may need a larger learning rate",
    ]


def noise_batch_ratio(config: PrivacyConfig) -> float:
    """The noise of a step over what a batch can add up to: sigma C over B C, in every direction.

    With correlated noise it is that of the independent noise whose sums over the steps have the same error. Training
    depends on the noise through this ratio (McKenna et al. 2025, "Scaling Laws for Differentially Private Language
    Models").
    """
    added = config.bands.error(config.steps) / INDEPENDENT.error(config.steps)
    return config.noise_multiplier * added / config.expected_batch_size


def noise_over_signal(config: PrivacyConfig, trained: int) -> float:
    """How long the noise of all steps together is, over the longest that all clipped gradients together can be.

    A step adds noise of length sigma C sqrt(P) to a sum of B gradients, each at most C long. Over T steps the gradients
    add up to T B C if all of them agree, and the noise, which is drawn anew each time, to sigma C sqrt(T P). Correlated
    noise adds up to less, by the ratio of the errors of its bands and of independent noise.

    Args:
        config: the mechanism.
        trained: P, the number of trained parameters.
    """
    return noise_batch_ratio(config) * math.sqrt(trained / config.steps)


def describe_noise(plan: RunPlan, trained: int) -> list[str]:
    """A warning line if the noise drowns whatever the run could learn; none otherwise.

    Args:
        plan: the plan.
        trained: number of trained parameters.
    """
    if plan.privacy is None or (ratio := noise_over_signal(plan.privacy, trained)) <= _DROWNED:
        return []
    reason = f"over all steps, the noise on {trained:,} trained parameters is {ratio:,.0f} times as long as the sum of"
    remedy = f"give a larger epsilon, more {plan.unit.sampled}, or train fewer parameters"
    return [f"too much noise         {reason} gradients can be: expect the model to learn nothing; {remedy}"]


def _meaning(epsilon: float, delta: float) -> str:
    odds = factor(log_odds(epsilon, delta))
    told = f"an attacker's guess is right at most {odds} times for each time that it is wrong; a blind guess, once"
    return f"which epsilon is that  {verdict(epsilon)}: {told}"


def describe_needed_data(plan: RunPlan) -> list[str]:
    """How much noise other epsilons and other amounts of data need, as lines of text; none without privacy.

    It takes seconds: for plans that a user asks for, not for runs.
    """
    if plan.privacy is None:
        return []
    targets = sorted({*USUAL_EPSILONS, *([] if plan.target_epsilon is None else [plan.target_epsilon])})
    work = Work(
        batch=plan.privacy.sampling_probability * plan.num_examples,
        steps=plan.steps,
        delta=plan.privacy.delta,
        group_size=plan.unit.group_size,
        max_batch=plan.max_batch,
    )
    return describe_data_needed(work, plan.num_examples, targets, plan.unit.sampled)
