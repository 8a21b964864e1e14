"""What is printed: the plan, the rule's range, whether there are enough rows, and a table with the chosen batch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dptune.run.noise_ratios import noise_batch_ratio
from dptune.run.plan_lines import describe_plan
from tests.fitted_rule import RULE, quick_noise
from utils.planning.arguments import PlannerArguments
from utils.planning.proposal import Proposal, propose
from utils.planning.report import describe_proposal
from utils.planning.rule import Rule
from utils.planning.search import kept, quietest
from utils.training.lora_arguments import LoraArguments


def arguments(model: Path, **changes: Any) -> PlannerArguments:
    given: dict[str, Any] = {
        "num_examples": 400,
        "tokens_per_example": 20.0,
        "model_name_or_path": str(model),
        "hours": 0.2,
        "target_epsilon": 8.0,
        "tokens_per_second": 1000.0,
    }
    return PlannerArguments(**(given | changes))


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick_noise():
        yield


@pytest.fixture(scope="module")
def given(tiny_model_dir: Path) -> PlannerArguments:
    return arguments(tiny_model_dir)


@pytest.fixture(scope="module")
def proposal(given: PlannerArguments) -> Proposal:
    return propose(given, LoraArguments(), (), RULE)


def printed(proposal: Proposal, given: PlannerArguments, rule: Rule = RULE) -> str:
    return "\n".join(describe_proposal(proposal, rule, given))


def test_the_plan_the_time_and_the_memory_are_told(proposal: Proposal, given: PlannerArguments) -> None:
    lines = describe_proposal(proposal, RULE, given)
    text = "\n".join(lines)
    assert set(describe_plan(proposal.plan)) <= set(lines)
    taken = proposal.chosen.steps * proposal.chosen.expected_batch_size * 20 / 1000 / 3600
    passes = proposal.chosen.steps * proposal.chosen.sampling_probability
    assert f"time                   {taken:.3g} of 0.2 hours: {passes:.3g} passes over the data" in text
    assert "speed                  1,000 tokens per second, as given" in text
    assert f"learning rate          {proposal.rate[0]:g}, train_clm.py's default" in text
    assert "what is trained        LoRA adapters: rank" in text
    assert "memory per device      about" in text
    assert lines[-2:] == ["train with", proposal.line]


def test_a_run_that_ends_early_says_why(proposal: Proposal, given: PlannerArguments) -> None:
    why = "training for twice as long would be worse, by the rule"
    assert why not in printed(proposal, given)
    assert " of 0.4 hours: " in printed(proposal, replace(given, hours=0.4))
    assert why in printed(proposal, replace(given, hours=0.4))


def test_noise_in_which_nothing_can_be_learned_is_told(proposal: Proposal, given: PlannerArguments) -> None:
    privacy = proposal.plan.privacy
    assert privacy is not None
    drowned = replace(proposal, plan=replace(proposal.plan, privacy=replace(privacy, noise_multiplier=1e4)))
    assert "too much noise " in printed(drowned, given)
    assert "too much noise " not in printed(proposal, given)


def test_the_rule_and_its_range_are_told(proposal: Proposal, given: PlannerArguments) -> None:
    ratio = noise_batch_ratio(proposal.chosen)
    wide = replace(RULE, steps=(1, 10**6), ratios=(1e-6, 10.0), bands=64)
    assert "only a guess" not in printed(proposal, given, wide)
    text = printed(proposal, given, replace(wide, steps=(1, 2), ratios=(10.0, 20.0)))
    assert f"outside that range: {proposal.chosen.steps:,} steps and noise over batch {ratio:.2g}" in text
    assert "fitted on made-up runs: 1 to 2 steps, noise over batch 10 to 20, up to 64 noise bands" in text


def test_the_table_marks_the_chosen_batch_and_has_a_column_for_each_epsilon(
    proposal: Proposal, given: PlannerArguments
) -> None:
    text = printed(proposal, given)
    (head,) = re.findall(r"^ +batch .*$", text, flags=re.MULTILINE)
    assert head.split()[-6:] == ["eps", "1", "eps", "3", "eps", "8"]
    rows = re.findall(r"^  [> ] .*%$", text, flags=re.MULTILINE)
    assert len(rows) == min(8, len(proposal.options))
    (chosen,) = [row.split()[1:] for row in rows if ">" in row]
    config = proposal.chosen
    assert chosen[:2] == [f"{int(config.expected_batch_size):,}", f"{config.steps:,}"]
    assert chosen[7] == f"{RULE.loss(config.steps, noise_batch_ratio(config)):.3f}"
    for word, epsilon in zip(chosen[-3:], (1.0, 3.0, 8.0), strict=True):
        other = quietest(proposal.limits, int(config.expected_batch_size), epsilon)
        assert word == f"{kept(other, RULE):.0%}"


def test_another_epsilon_has_a_column_too(tiny_model_dir: Path) -> None:
    given = arguments(tiny_model_dir, target_epsilon=5.0, num_examples=100, hours=0.05)
    text = printed(propose(given, LoraArguments(), (), RULE), given)
    (head,) = re.findall(r"^ +batch .*$", text, flags=re.MULTILINE)
    assert head.split()[-8:] == ["eps", "1", "eps", "3", "eps", "5", "eps", "8"]


def test_too_few_rows_are_told_with_how_many_it_takes(proposal: Proposal, given: PlannerArguments) -> None:
    assert "TOO LITTLE DATA" not in printed(proposal, given, replace(RULE, noise=1e-3))
    config = proposal.chosen
    loud = replace(RULE, noise=RULE.noise * RULE.ratio_that_keeps(0.45, config.steps) / noise_batch_ratio(config))
    assert kept(config, loud) == pytest.approx(0.45)
    text = printed(proposal, given, loud)
    (told,) = re.findall(
        r"^TOO LITTLE DATA +for epsilon 8: about ([\d,]+) rows would keep 50% of the gain, ", text, re.M
    )
    assert int(told.replace(",", "")) > 400
    assert "no number of rows" in printed(proposal, given, replace(RULE, noise=1e12))


def test_a_plot_is_named(proposal: Proposal, given: PlannerArguments) -> None:
    assert "plot " not in printed(proposal, given)
    assert "plot                   trade.png" in printed(proposal, replace(given, plot="trade.png"))


def test_a_whole_model_and_an_adapter_are_named(proposal: Proposal, given: PlannerArguments) -> None:
    whole = replace(proposal, lora=LoraArguments(trainable=["all"]))
    assert "what is trained        the model itself: all" in printed(whole, given)
    further = replace(proposal, lora=LoraArguments(initial_adapter="old"))
    assert "what is trained        the adapter old" in printed(further, given)
