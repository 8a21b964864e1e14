"""Defaults that depend on privacy, the model and what is trained: the optimizer and its learning rate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from dptune.bands import best_bands
from dptune.mechanism import PrivacyConfig
from dptune.run.noise_ratios import error_ratio, noise_batch_ratio
from utils.training.arguments import Groups

# Measured by benchmarks/studies: with independent noise AdamW is the better one of the two.
CORRELATED_OPTIMIZER, OPTIMIZER = "lowpass-adam", "adamw"
PLAIN_RATE = 3e-4
# {parameters of the model at most: rate of its adapters}, where alpha is the rank
_ADAPTER_RATES = {300e6: 6e-3, 2e9: 2e-3, math.inf: 1e-3}
# The best rate of Adam falls with the width of the layers (Yang et al. 2022, "Tensor Programs V").
_WHOLE_RATE_TIMES_WIDTH, _LARGEST_WHOLE_RATE = 0.4, 6e-3
# Noise over batch, in a run of so many steps, above which the best rate of whole models falls, about with its root. In
# longer runs less noise is loud, because it adds up with the root of the number of steps.
_LOUD, _LOUD_STEPS = 0.004, 75
_OF_CORRELATED = 2 / 3  # the rate of `lowpass-adam` over that of AdamW, both with little noise
_MEASURED_BANDS = 8  # of the runs that the rates of `lowpass-adam` are from


def private_rate(parameters: int, width: int, config: PrivacyConfig, optimizer: str, *, whole: bool) -> float:
    """The default learning rate under privacy, of any kind of Adam, to two figures.

    Args:
        parameters: number of the model's parameters.
        width: see `width_of`.
        config: the mechanism.
        optimizer: name of the optimizer.
        whole: whether parameters of the model itself are trained, not adapters.
    """
    if whole:
        return rate_under_noise(whole_rate(width), config, optimizer)
    return next(rate for most, rate in _ADAPTER_RATES.items() if parameters <= most)


def private_rate_of(model: Any, config: PrivacyConfig, optimizer: str, *, whole: bool) -> float:
    """`private_rate` of a transformers model, with or without its weights."""
    parameters = sum(one.numel() for one in model.parameters())
    return private_rate(parameters, width_of(model.config), config, optimizer, whole=whole)


def width_of(config: Any) -> int:
    """The length of a token's vector between the layers of a transformers model, from its configuration."""
    return int(config.get_text_config().hidden_size)


def whole_rate(width: int) -> float:
    """The private learning rate of a whole model of this width where noise is small, to two figures."""
    return float(f"{min(_LARGEST_WHOLE_RATE, _WHOLE_RATE_TIMES_WIDTH / width):.1e}")


def rate_under_noise(rate: float, config: PrivacyConfig, optimizer: str) -> float:
    """The default rate of a whole model with this much noise and so many steps, to two figures.

    It falls where noise is large or the run is long. `lowpass-adam` divides by averaged gradients, whose noise is
    nearly the same for any number of bands. That of sums over steps is larger with few bands, so the rate must be
    smaller.

    Args:
        rate: the rate where noise is small, in a short run.
        config: the mechanism.
        optimizer: name of the optimizer.
    """
    noise = noise_batch_ratio(config) * math.sqrt(config.steps / _LOUD_STEPS)
    share = min(1.0, math.sqrt(_LOUD / noise))
    if optimizer == CORRELATED_OPTIMIZER:
        measured = best_bands(min(_MEASURED_BANDS, config.steps), config.steps)
        share *= min(1.0, error_ratio(measured, config.steps) / error_ratio(config.bands, config.steps))
        share *= _OF_CORRELATED
    return float(f"{rate * share:.1e}")


def default_optimizer(noise_bands: int) -> str:
    """The optimizer for a plan with so many noise bands; 1 for independent noise, and without privacy."""
    return OPTIMIZER if noise_bands == 1 else CORRELATED_OPTIMIZER


def with_chosen_defaults(groups: Groups, model: Any, config: PrivacyConfig | None) -> Groups:
    """The flags, with the optimizer, the learning rate and the noise bands that were left open.

    Args:
        groups: the flags.
        model: the model, with or without its weights.
        config: the plan's mechanism; None without privacy.
    """
    given, whole = groups.optimization, bool(groups.lora.trainable)
    optimizer, rate = given.optimizer or default_optimizer(1 if config is None else config.noise_bands), PLAIN_RATE
    if config is not None:
        rate = private_rate_of(model, config, optimizer, whole=whole)
    rate = rate if given.learning_rate is None else given.learning_rate
    privacy = groups.privacy if config is None else replace(groups.privacy, noise_bands=groups.privacy.bands)
    return groups._replace(optimization=replace(given, optimizer=optimizer, learning_rate=rate), privacy=privacy)


def describe_optimizer(given: str | None, chosen: str | None) -> list[str]:
    """A printed line about the optimizer, unless it was given."""
    if given is not None:
        return []
    reason = "without noise bands" if chosen == OPTIMIZER else "with noise bands"
    return [f"optimizer              {chosen} (default {reason})"]


def describe_chosen(given: Groups, chosen: Groups) -> list[str]:
    """Printed lines about what the flags left open.

    Args:
        given: the flags.
        chosen: the same by `with_chosen_defaults`.
    """
    private = chosen.privacy.is_private
    lines = describe_optimizer(given.optimization.optimizer, chosen.optimization.optimizer)
    if given.optimization.learning_rate is None:
        whole = "a whole model of this width and this noise"
        what = whole if chosen.lora.trainable else "adapters of a model of this size"
        source = f"default with privacy for {what}" if private else "default without privacy"
        lines.append(f"learning rate          {chosen.optimization.learning_rate:g} ({source})")
    return lines
