"""The plan of a run as lines of text for the user: what is sampled, the noise, epsilon and what it means."""

from __future__ import annotations

from pathlib import Path

from dptune._validate import present
from dptune.accounting import USELESS_EPSILON
from dptune.accounting.data_needed import USUAL_EPSILONS, Work, describe_data_needed, noise_if_any
from dptune.accounting.delta import delta_in_words
from dptune.accounting.meaning import factor, log_odds, verdict
from dptune.accounting.rounding import rounded_up
from dptune.bands import INDEPENDENT
from dptune.budget import Budget
from dptune.clipping_styles import FLAT, clipping_in_words
from dptune.ledger import LEDGER_NAME
from dptune.mechanism import PrivacyConfig
from dptune.run.noise_ratios import noise_over_signal
from dptune.run.plan import ROW, RunPlan, spends_to_come

_MUCH = 128 << 20  # bytes
_DROWNED = 10.0  # the update is then at best 6 degrees away from a right angle to what was learned


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


def _meaning(epsilon: float, delta: float) -> str:
    odds = factor(log_odds(epsilon, delta))
    told = f"an attacker's guess is right at most {odds} times for each time that it is wrong; a blind guess, once"
    return f"which epsilon is that  {verdict(epsilon)}: {told}"


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


def describe_noise(plan: RunPlan, trained: int) -> list[str]:
    """Lines about the memory that noise bands take, if it is much, and about noise that drowns what a run could learn.

    Args:
        plan: the plan.
        trained: number of trained parameters.
    """
    if plan.privacy is None:
        return []
    kept = 8 * plan.privacy.noise_bands * trained if plan.privacy.noise_bands > 1 else 0
    told = f"{kept / 2**30:.1f} GiB of the machine's memory per process; with sharded weights its share of that"
    memory = [f"noise bands take       {told}"] if kept >= _MUCH else []
    return [*memory, *_describe_drowning(plan, trained)]


def _describe_drowning(plan: RunPlan, trained: int) -> list[str]:
    if plan.privacy is None or (ratio := noise_over_signal(plan.privacy, trained)) <= _DROWNED:
        return []
    reason = f"over all steps, the noise on {trained:,} trained parameters is {ratio:,.0f} times as long as the sum of"
    remedy = f"give a larger epsilon, more {plan.unit.sampled}, or train fewer parameters"
    return [f"too much noise         {reason} gradients can be: expect the model to learn nothing; {remedy}"]


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
