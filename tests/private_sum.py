"""One whole private step with the noise taken out, so that tests see the sum that the noise must cover."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, Keystream, Ledger, PrivacyConfig, PrivateStep, deal
from tests.examples import padded
from tests.reference import Example

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]


class NoNoise:
    """Stands in for `GaussianNoise`: zeros."""

    source, relative_std = "none", 1.0
    keystream = Keystream.for_tests("no noise")

    def __init__(self, size: int, *, device: torch.device | None = None) -> None:
        del device
        self.size = size

    def add_to(self, sum_P: Tensor, std: float, *, grid: float) -> None:
        """Leave the sum as it is, not even rounded."""

    def close(self) -> None:
        """Nothing to end."""


def config_for(count: int, *, clip_norm: float, expected_batch_size: float | None = None) -> PrivacyConfig:
    return PrivacyConfig(
        num_examples=max(count, 2),
        expected_batch_size=expected_batch_size or max(count, 2) / 2,
        steps=10,
        clip_norm=clip_norm,
        noise_multiplier=1.0,
        delta=1e-5,
    )


def sum_so_far(step: PrivateStep) -> Tensor:
    """What an open step has summed until now, flat float64: the very tensor."""
    sums: Any = step._begun()
    found: Tensor = sums._sum_P
    return found


def own_mean(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return CausalLMLoss(model)(ids, labels)


def private_sum(
    model: nn.Module,
    examples: Sequence[Example],
    draw: Sequence[int],
    config: PrivacyConfig,
    *,
    token_budget: int = 64,
    losses: Losses = own_mean,
    cut: Callable[..., list[list[np.ndarray]]] = deal,
) -> Tensor:
    """The clipped sum over `draw`, flat float64: a step's release without noise, times the expected batch size."""
    lengths = np.array([len(ids) for ids, _ in examples])
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with (
        TemporaryDirectory() as folder,
        PrivateStep(model, config, ledger=Ledger(Path(folder) / "ledger.jsonl"), noise=NoNoise(size)) as step,
    ):
        for rows in cut(np.array(draw, dtype=np.int64), lengths, token_budget=token_budget)[0]:
            step.backward(losses(model, *padded([examples[row] for row in rows])))
        step.finish()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten().double() for grad in grads]) * config.expected_batch_size
