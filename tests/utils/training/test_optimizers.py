"""Optimizers by name, and a separate learning rate for the classification head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.training.optimizers import OPTIMIZERS, UpdateSettings, make_optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_head_trains_at_its_own_rate_and_the_rest_at_theirs(name: str) -> None:
    body, head = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    settings = UpdateSettings(name, learning_rate=0.01, weight_decay=0.0, head_learning_rate=0.5)
    optimizer = make_optimizer(settings, [head, body], lambda: 0.0, head=[head])
    for parameter in (body, head):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert body.tolist() == pytest.approx([-0.01] * 3, rel=1e-4)
    assert head.tolist() == pytest.approx([-0.5] * 2, rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == 0.01  # what the log shows


@pytest.mark.parametrize(("rate", "with_head"), [(None, True), (0.5, False)])
def test_without_a_rate_or_a_head_there_is_one_group(rate: float | None, with_head: bool) -> None:
    body, head = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    settings = UpdateSettings("adamw", learning_rate=0.01, weight_decay=0.0, head_learning_rate=rate)
    optimizer = make_optimizer(settings, [body, head], lambda: 0.0, head=[head] if with_head else [])
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
