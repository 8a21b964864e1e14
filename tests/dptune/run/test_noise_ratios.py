"""The noise of a run over what it can learn, compared with noise that is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dptune.run.noise_ratios import noise_batch_ratio, noise_over_signal
from dptune.run.plan import make_plan
from dptune.run.settings import PrivacySettings

DELTA = 1e-4
RUN: dict[str, Any] = {"num_examples": 100, "batch": 12, "steps": 8}


def test_the_noise_is_compared_with_what_all_gradients_can_add_up_to() -> None:
    config = make_plan(PrivacySettings(noise_multiplier=2.0, delta=DELTA, clip_norm=3.0), **RUN).privacy
    assert config is not None
    trained, trials, generator = 50, 400, torch.Generator().manual_seed(0)
    std = config.noise_multiplier * config.clip_norm
    noise = torch.randn(trials, config.steps, trained, generator=generator) * std
    longest = config.steps * config.expected_batch_size * config.clip_norm
    assert noise_over_signal(config, trained) == pytest.approx(
        float(noise.sum(1).norm(dim=1).mean()) / longest, rel=0.02
    )
    assert noise_batch_ratio(config) == pytest.approx(std / (config.expected_batch_size * config.clip_norm))
