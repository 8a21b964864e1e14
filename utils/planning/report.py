"""What the planner prints: the proposal, the alternatives, whether there are enough data, and the command line."""

from __future__ import annotations

from collections.abc import Iterator

from dptune.accounting.data_needed import USUAL_EPSILONS
from dptune.accounting.rounding import rounded_up, rounded_up_to_figures
from dptune.mechanism import PrivacyConfig
from dptune.run.noise_ratios import noise_batch_ratio, noise_over_signal
from dptune.run.plan_lines import describe_noise, describe_plan
from utils.planning.arguments import PlannerArguments
from utils.planning.proposal import Proposal
from utils.planning.rule import Rule
from utils.planning.search import ENOUGH, Limits, examples_needed, kept, quietest
from utils.training.plan import describe_model

_ROWS = 8
_SOONER = "training for twice as long would be worse, by the rule: more steps need more noise for the same epsilon"
_INDENT = " " * 23


def describe_proposal(proposal: Proposal, rule: Rule, given: PlannerArguments) -> list[str]:
    """Everything, as printed lines; the last one is the command line that trains.

    Args:
        proposal: the proposal.
        rule: what it was chosen by.
        given: the planner's flags.
    """
    target_epsilon = given.target_epsilon
    return [
        *_settings(proposal, given.hours),
        *describe_model(proposal.model, proposal.memory, proposal.available),
        *describe_noise(proposal.plan, proposal.trained),
        *_expectation(proposal, rule, target_epsilon),
        *_table(proposal, rule, target_epsilon),
        *([] if given.plot is None else [f"plot                   {given.plot}"]),
        "train with",
        proposal.line,
    ]


def _settings(proposal: Proposal, hours: float) -> list[str]:
    limits, chosen, lora = proposal.limits, proposal.chosen, proposal.lora
    rate, source = proposal.rate
    epochs = chosen.steps * chosen.sampling_probability
    adapter = f"rank {lora.lora_r}, alpha {lora.lora_alpha:g}, on {' '.join(lora.lora_target_modules)}"
    trained = f"the model itself: {' '.join(lora.trainable)}" if lora.trainable else f"LoRA adapters: {adapter}"
    trained = trained if lora.initial_adapter is None else f"the adapter {lora.initial_adapter}"
    return [
        f"speed                  {limits.speed.told}",
        f"time                   {limits.hours(chosen):.3g} of {hours:.3g} hours: {epochs:.3g} passes over the data",
        *([f"{_INDENT}{_SOONER}"] if limits.seconds < 3600 * hours else []),
        *describe_plan(proposal.plan),
        f"learning rate          {rate:g}, {source}",
        f"what is trained        {trained}",
    ]


def _expectation(proposal: Proposal, rule: Rule, target_epsilon: float) -> Iterator[str]:
    """What the rule expects, what it was fitted on, and whether there are enough data."""
    config = proposal.chosen
    ratio, share = noise_batch_ratio(config), kept(config, rule)
    whole = noise_over_signal(config, proposal.trained)
    yield f"noise over batch       {ratio:.2g}; noise over signal of all steps {whole:.2g}"
    yield f"expectation            {share:.0%} of the gain that these steps would bring without noise, by the rule"
    yield f"rule                   {rule.in_words}"
    if outside := rule.outside(config.steps, ratio, config.noise_bands):
        yield f"{_INDENT}only a guess for this run, which is outside that range: {' and '.join(outside)}"
    if share < ENOUGH:
        needed = examples_needed(config, rule, target_epsilon)
        many = "no number of rows" if needed is None else f"about {_two(needed)} rows"
        told = f"for epsilon {rounded_up(target_epsilon, trim=True)}: {many} would keep {ENOUGH:.0%} of the gain"
        yield f"TOO LITTLE DATA        {told}, with this batch and these steps"


def _two(number: int) -> str:
    return f"{float(rounded_up_to_figures(number, 2)):,.0f}"


def _table(proposal: Proposal, rule: Rule, target_epsilon: float) -> list[str]:
    """The options around the chosen one, and which share of the gain other epsilons keep."""
    limits = proposal.limits
    epsilons = sorted({*USUAL_EPSILONS, target_epsilon})
    names = [f"eps {rounded_up(one, trim=True)}" for one in epsilons]
    head = ["", "batch", "steps", "passes", "hours", "bands", "noise", "over batch", "loss", *names]
    grid = [head]
    for one in proposal.around(_ROWS):
        others = [quietest(limits, int(one.expected_batch_size), epsilon) for epsilon in epsilons]
        mark = ">" if one == proposal.chosen else ""
        grid.append([mark, *_cells(one, limits, rule), *(f"{kept(other, rule):.0%}" for other in others)])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    rows = ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in grid]
    target = f"epsilon {rounded_up(target_epsilon, trim=True)}"
    title = f"for each batch at {target}: noise multiplier (up to 5% too large), noise over batch,"
    return [
        f"compared               {title}",
        f"{_INDENT}the fitted model's loss, and the share of the noise-free gain that each epsilon keeps, by the rule",
        *(f"  {row}" for row in rows),
    ]


def _cells(config: PrivacyConfig, limits: Limits, rule: Rule) -> list[str]:
    """A row of the table, without the other epsilons."""
    ratio = noise_batch_ratio(config)
    return [
        f"{int(config.expected_batch_size):,}",
        f"{config.steps:,}",
        f"{config.steps * config.sampling_probability:.3g}",
        f"{limits.hours(config):.3g}",
        f"{config.noise_bands}",
        rounded_up_to_figures(config.noise_multiplier, 3),
        f"{ratio:.2g}",
        f"{rule.loss(config.steps, ratio):.3f}",
    ]
