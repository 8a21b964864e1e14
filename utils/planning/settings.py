"""The settings of a proposal that depend neither on the accounting nor on the memory: rank and learning rate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from dptune.mechanism import PrivacyConfig
from dptune.run.noise_ratios import noise_batch_ratio, noise_over_signal
from utils.planning.rule import Rule
from utils.training.chosen_defaults import default_optimizer, private_rate
from utils.training.lora_arguments import LoraArguments

CLIP_NORM = 1.0  # AdamW divides by the gradient's size, and so by the clip norm
WARMUP = 0.1  # share of the steps, as in the runs that the rule was fitted on
RANK, LEAST_RANK = 16, 4
_LOUD = 1.0  # noise over signal of a whole run, above which fewer parameters are trained
_NEAR = 10  # the rule's learning rates are used for models up to 10 times larger or smaller than the fitted one


def with_rank(lora: LoraArguments, named: Collection[str], rank: int = RANK) -> LoraArguments:
    """The flags with this rank, and a scale that goes with it, where the user gave none.

    Args:
        lora: the flags of what is trained.
        named: names of the flags that the user gave.
        rank: the rank.
    """
    rank = lora.lora_r if "lora_r" in named else rank
    return replace(lora, lora_r=rank, lora_alpha=lora.lora_alpha if "lora_alpha" in named else float(rank))


def choose_rank(config: PrivacyConfig, trained: int) -> int:
    """The largest rank, from `RANK` down to `LEAST_RANK`, with which the noise does not exceed the signal.

    Args:
        config: the mechanism.
        trained: number of trained parameters at `RANK`.
    """
    rank = RANK
    while rank > LEAST_RANK and noise_over_signal(config, trained * rank // RANK) > _LOUD:
        rank //= 2
    return rank


def choose_rate(rule: Rule, config: PrivacyConfig, parameters: int, width: int, *, whole: bool) -> tuple[float, str]:
    """The learning rate, rounded to two digits, and where it comes from.

    Args:
        rule: tells the rate of models like the fitted one.
        config: the mechanism.
        parameters, width: of the model, see `private_rate`.
        whole: whether parameters of the model itself are trained, not adapters.
    """
    if whole == rule.whole and parameters <= _NEAR * rule.parameters and rule.parameters <= _NEAR * parameters:
        rate = rule.learning_rate(config.steps, noise_batch_ratio(config), config.noise_bands)
        return float(f"{rate:.1e}"), "by the fitted rule"
    rate = private_rate(parameters, width, config, default_optimizer(config.noise_bands), whole=whole)
    return rate, "train_clm.py's default, because the rule was fitted on another kind or size of model"
