"""A run before it starts: how it samples, how many steps it takes, its noise and its epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from dptune import accounting
from dptune._validate import present, refuse, require_delta, require_positive
from dptune.accounting import USELESS_EPSILON, Cut, Spend
from dptune.accounting.data_needed import USUAL_EPSILONS, Work, describe_data_needed
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.accounting.meaning import factor, log_odds, verdict
from dptune.accounting.rounding import rounded_up
from dptune.budget import Budget
from dptune.clipping_styles import FLAT, Clipping, PerLayer, clipping_in_words
from dptune.ledger import LEDGER_NAME
from dptune.mechanism import PrivacyConfig, cut_of, require_max_batch, sampling_probability
from dptune.sampling import Parts
from dptune.units.unit import PrivacyUnit, Unit

ROW = PrivacyUnit()
_DROWNED = 10.0  # the update is then at best 6 degrees away from a right angle to what was learned


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

    Raises:
        InvalidArgument: both or neither of the noise multiplier and the target epsilon, or a value outside its range.
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    clipping: Clipping = FLAT
    register: str | None = None

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

    def sigma(self, *, sampling_probability: float, steps: int, group_size: int, cut: Cut | None = None) -> float:
        """The noise multiplier: the given one, or the smallest that keeps epsilon at or below the target."""
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
    sigma = replace(settings, delta=delta).sigma(
        sampling_probability=q, steps=steps, group_size=unit.group_size, cut=cut
    )
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
    """The step after which a run ends: the planned one, or an earlier one if repeated steps used up the budget.

    Args:
        plan: the run's plan.
        recorded: steps in the ledger, including those that a crash threw away.
        completed: steps that are part of the result so far.
    """
    config = plan.privacy
    if config is None or plan.target_epsilon is None or recorded <= completed:
        return plan.steps
    affordable = accounting.max_steps(
        target_epsilon=plan.target_epsilon,
        delta=config.delta,
        noise_multiplier=config.noise_multiplier,
        sampling_probability=config.sampling_probability,
        at_least=plan.steps,
        group_size=config.group_size,
        cut=config.cut,
    )
    return min(plan.steps, max(completed, completed + affordable - recorded))


def spends_to_come(plan: RunPlan, steps: int) -> list[Spend]:
    """What `steps` more steps of a run will spend; none without privacy."""
    if plan.privacy is None or not steps:
        return []
    config = plan.privacy
    return [Spend(config.noise_multiplier, config.sampling_probability, steps, config.group_size, config.cut)]


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


def describe_plan(plan: RunPlan) -> list[str]:
    """The plan as lines of text for the user."""
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
        f"clip norm              {plan.privacy.clip_norm:g}",
        *style,
        f"noise multiplier       {plan.privacy.noise_multiplier:g}",
        f"epsilon                {rounded_up(epsilon)} at delta {plan.privacy.delta:g}",
        *([f"{'':<23}{delta_in_words(plan.num_examples, sampled)}"] if plan.chose_delta else []),
        f"too little noise       {useless}" if epsilon > USELESS_EPSILON else _meaning(epsilon, plan.privacy.delta),
    ]


def noise_over_signal(config: PrivacyConfig, trained: int) -> float:
    """How long the noise of all steps together is, over the longest that all clipped gradients together can be.

    A step adds noise of length sigma C sqrt(P) to a sum of B gradients, each at most C long. Over T steps the gradients
    add up to T B C if all of them agree, and the noise, which is drawn anew each time, to sigma C sqrt(T P).

    Args:
        config: the mechanism.
        trained: P, the number of trained parameters.
    """
    signal = config.expected_batch_size * math.sqrt(config.steps)
    return config.noise_multiplier * math.sqrt(trained) / signal


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
