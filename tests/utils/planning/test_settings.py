"""Rank and learning rate: smaller ranks where noise is loud, the rule's rate only for models like the fitted one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptune.mechanism import PrivacyConfig
from dptune.run.noise_ratios import noise_batch_ratio, noise_over_signal
from tests.fitted_rule import RULE
from utils.planning.settings import LEAST_RANK, RANK, choose_rank, choose_rate, with_rank
from utils.training.chosen_defaults import private_rate
from utils.training.lora_arguments import LoraArguments

CONFIG = PrivacyConfig(
    num_examples=10_000,
    expected_batch_size=256,
    steps=100,
    clip_norm=1.0,
    noise_multiplier=1.0,
    delta=1e-6,
    noise_bands=4,
)


def test_the_rank_falls_until_noise_does_not_exceed_the_signal() -> None:
    quiet = int((1 / noise_over_signal(CONFIG, 1)) ** 2)  # trained parameters with as much noise as signal
    assert choose_rank(CONFIG, quiet) == RANK
    assert choose_rank(CONFIG, 2 * quiet) == RANK // 2
    assert choose_rank(CONFIG, 1000 * quiet) == LEAST_RANK


def test_a_rank_or_scale_of_the_users_stays() -> None:
    assert with_rank(LoraArguments(), (), 8) == LoraArguments(lora_r=8, lora_alpha=8.0)
    given = LoraArguments(lora_r=3)
    assert with_rank(given, {"lora_r"}, 8) == LoraArguments(lora_r=3, lora_alpha=3.0)
    assert with_rank(LoraArguments(lora_alpha=5.0), {"lora_alpha"}, 8) == LoraArguments(lora_r=8, lora_alpha=5.0)


def test_a_model_like_the_fitted_one_gets_the_rules_rate() -> None:
    rate, source = choose_rate(RULE, CONFIG, 2 * RULE.parameters, 64, whole=True)
    assert rate == pytest.approx(RULE.learning_rate(100, noise_batch_ratio(CONFIG), 4), rel=0.05)
    assert source == "by the fitted rule"


@pytest.mark.parametrize(
    ("whole", "parameters", "rate"),
    [
        (True, 10**6, 2.7e-4),
        (True, 1_000, 2.7e-4),
        (False, 20_000, 6e-3),
        (False, 10**9, 2e-3),
        (False, 7 * 10**9, 1e-3),
    ],
)
def test_another_model_gets_the_default_rate(whole: bool, parameters: int, rate: float) -> None:
    found, source = choose_rate(RULE, CONFIG, parameters, 800, whole=whole)
    assert found == rate
    assert found == private_rate(parameters, 800, CONFIG, "lowpass-adam", whole=whole)
    assert "default" in source
    assert (
        choose_rate(replace(RULE, parameters=parameters, whole=whole), CONFIG, parameters, 800, whole=whole)[1]
        != source
    )
