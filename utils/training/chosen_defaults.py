"""Defaults that depend on privacy, the model and what is trained: the optimizer and its learning rate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from utils.training.arguments import Groups

# Measured by benchmarks/studies: with independent noise AdamW is the better one of the two.
CORRELATED_OPTIMIZER, OPTIMIZER = "lowpass-adam", "adamw"
PLAIN_RATE = 3e-4
# {parameters of the model at most: rate of its adapters}, where alpha is the rank
_ADAPTER_RATES = {300e6: 6e-3, 2e9: 2e-3, math.inf: 1e-3}
# The best rate of Adam falls with the width of the layers (Yang et al. 2022, "Tensor Programs V").
_WHOLE_RATE_TIMES_WIDTH, _LARGEST_WHOLE_RATE = 0.4, 6e-3


def private_rate(parameters: int, width: int, *, whole: bool) -> float:
    """The default learning rate under privacy, of any kind of Adam, to two figures.

    Args:
        parameters: number of the model's parameters.
        width: length of its token embeddings.
        whole: whether parameters of the model itself are trained, not adapters.
    """
    if whole:
        return float(f"{min(_LARGEST_WHOLE_RATE, _WHOLE_RATE_TIMES_WIDTH / width):.1e}")
    return next(rate for most, rate in _ADAPTER_RATES.items() if parameters <= most)


def private_rate_of(model: Any, *, whole: bool) -> float:
    """`private_rate` of a transformers model, with or without its weights."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return private_rate(parameters, model.get_input_embeddings().weight.shape[-1], whole=whole)


def default_optimizer(noise_bands: int) -> str:
    """The optimizer for a plan with so many noise bands; 1 for independent noise, and without privacy."""
    return OPTIMIZER if noise_bands == 1 else CORRELATED_OPTIMIZER


def with_chosen_defaults(groups: Groups, model: Any, noise_bands: int) -> Groups:
    """The flags, with the optimizer, the learning rate and the noise bands that were left open.

    Args:
        groups: the flags.
        model: the model, with or without its weights.
        noise_bands: the plan's number of noise bands; 1 for independent noise, and without privacy.
    """
    given, private = groups.optimization, groups.privacy.is_private
    optimizer, rate = given.optimizer or default_optimizer(noise_bands), given.learning_rate
    if rate is None:
        rate = private_rate_of(model, whole=bool(groups.lora.trainable)) if private else PLAIN_RATE
    privacy = replace(groups.privacy, noise_bands=groups.privacy.bands) if private else groups.privacy
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
        what = "a whole model of this width" if chosen.lora.trainable else "adapters of a model of this size"
        source = f"default with privacy for {what}" if private else "default without privacy"
        lines.append(f"learning rate          {chosen.optimization.learning_rate:g} ({source})")
    return lines
