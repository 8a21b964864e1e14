"""A proposal: settings that fit the model, the memory and the time, and a plan that the training would make too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dptune import bands
from dptune._validate import InvalidArgument
from dptune.accounting.delta import default_delta
from dptune.mechanism import PrivacyConfig
from tests.fitted_rule import RULE
from tests.tiny import tiny_llama
from utils.planning import proposal as module
from utils.planning.arguments import PlannerArguments
from utils.planning.proposal import Proposal, propose
from utils.planning.rule import Rule
from utils.planning.search import Limits
from utils.planning.speed import flops_per_token
from utils.training.lora_arguments import LoraArguments

CONFIG = PrivacyConfig(
    num_examples=300,
    expected_batch_size=32,
    steps=12,
    clip_norm=1.0,
    noise_multiplier=30.0,
    delta=1e-4,
    noise_bands=2,
)


@pytest.fixture
def proposed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A proposal with flags changed, whose search finds one batch at once. Its limits are what the search was given."""

    def found(limits: Limits, target_epsilon: float, rule: Rule) -> tuple[Limits, list[PrivacyConfig]]:
        assert (target_epsilon, rule) == (8.0, RULE)
        limits.batches()
        return limits, [CONFIG]

    monkeypatch.setattr(module, "search", found)

    def run(lora: LoraArguments | None = None, named: tuple[str, ...] = (), **changes: Any) -> Proposal:
        given: dict[str, Any] = {
            "num_examples": 300,
            "tokens_per_example": 20.0,
            "model_name_or_path": str(tiny_model_dir),
            "hours": 0.5,
            "target_epsilon": 8.0,
            "tokens_per_second": 1000.0,
        }
        return propose(PlannerArguments(**(given | changes)), lora or LoraArguments(), named, RULE)

    return run


def test_the_plan_is_that_of_the_flags(proposed: Any) -> None:
    found = proposed()
    plan = found.plan
    assert (plan.num_examples, plan.expected_batch_size, plan.steps) == (300, 32, 12)
    assert plan.privacy.noise_bands == 2
    assert plan.privacy.delta == default_delta(300)
    assert plan.privacy.planned_epsilon() <= 8
    assert f"--max_train_steps 12 --noise_bands 2 --learning_rate {found.rate[0]:g}" in found.line
    assert "--per_device_train_batch_size 16 --gradient_accumulation_steps 2 " in proposed(for_device="T4").line


def test_the_limits_are_what_was_given(proposed: Any) -> None:
    limits = proposed(delta=1e-4).limits
    assert (limits.num_examples, limits.tokens_per_example, limits.delta) == (300, 20.0, 1e-4)
    assert (limits.seconds, limits.speed.tokens_per_second, limits.processes) == (1800, 1000.0, 1)
    assert limits.most_steps == 1600, "four times the longest fitted run"
    assert limits.most_bands == 64


def test_no_more_bands_than_a_run_would_keep(proposed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = proposed(LoraArguments(trainable=["all"])).trained
    monkeypatch.setattr(module, "bands_within", lambda values: bands.bands_within(values, 3 * 8 * trained))
    assert proposed(LoraArguments(trainable=["all"])).limits.most_bands == 4


def test_the_speed_of_a_device_is_estimated_for_what_is_trained(proposed: Any) -> None:
    adapters = proposed(tokens_per_second=None, for_device="T4", for_devices=2)
    whole = proposed(LoraArguments(trainable=["all"]), tokens_per_second=None, for_device="T4", for_devices=2)
    ratio = adapters.limits.speed.tokens_per_second / whole.limits.speed.tokens_per_second
    expected = flops_per_token(tiny_llama(), 20.0, recompute=False)
    assert whole.limits.speed.tokens_per_second == pytest.approx(0.3 * 2 * 65e12 / expected)
    assert 1 < ratio < 1.5
    assert "--num_processes 2 --multi_gpu" in whole.line
    assert whole.line.startswith("accelerate launch --mixed_precision fp16")
    assert whole.line.endswith("--trainable all")
    assert whole.plan.expected_batch_size == 32, "over both processes"


def test_what_the_user_says_of_what_is_trained_stays(proposed: Any) -> None:
    found = proposed(LoraArguments(lora_r=2, lora_target_modules=["q_proj"]), ("lora_r", "lora_target_modules"))
    assert "--lora_r 2 --lora_alpha 2 --lora_target_modules q_proj" in found.line
    assert found.trained == 2 * 2 * (32 + 32)


def test_loud_noise_takes_a_smaller_rank_and_the_model_has_it(proposed: Any) -> None:
    found = proposed()
    assert found.lora.lora_r < 16, "it drowns what 12 steps of 32 rows add up to"
    assert f"--lora_r {found.lora.lora_r} --lora_alpha {found.lora.lora_r}" in found.line
    whole_rank = proposed(LoraArguments(lora_r=16), ("lora_r",))
    assert found.trained * 16 == whole_rank.trained * found.lora.lora_r


@pytest.mark.parametrize(("tokens", "size"), [(20.0, 64), (33.0, 128), (200.0, 256)])
def test_the_block_size_suits_rows_of_twice_the_average_and_the_context(
    proposed: Any, tokens: float, size: int
) -> None:
    assert f"--block_size {size} " in proposed(tokens_per_example=tokens).line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_size": 300}, "--block_size=300: the model's context is 256 tokens; give at most 256"),
        ({"tokens_per_example": 300.0}, "--tokens_per_example=300.0: rows are cut to --block_size 256, so"),
        ({"model_name_or_path": "nothing/such"}, "--model_name_or_path='nothing/such': no model could be loaded"),
        ({"hours": 1e-9}, "hours='1e-09': one step takes"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], told: str, proposed: Any) -> None:
    with pytest.raises(InvalidArgument) as refused:
        proposed(**changes)
    assert str(refused.value).startswith(told)


def test_the_options_around_the_chosen_one(proposed: Any) -> None:
    found = proposed()
    every = list(range(12))
    for chosen, expected in ((0, every[:8]), (6, every[2:10]), (11, every[4:])):
        around = Proposal(**(vars(found) | {"options": every, "chosen": chosen})).around(8)
        assert around == expected
    assert Proposal(**(vars(found) | {"options": [1, 2], "chosen": 2})).around(8) == [1, 2]
