"""Optimizers by name, and a separate learning rate for the classification head."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dptune import InvalidArgument
from utils.training.optimizers import EIGHT_BIT, OPTIMIZERS, PAGED, UpdateSettings, make_optimizer, require_works


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != PAGED])
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


@pytest.mark.parametrize(
    ("how", "steps", "expected"),
    [({}, 100, 0), ({"num_warmup_steps": 7}, 100, 7), ({"warmup_ratio": 0.1}, 30, 3), ({"warmup_ratio": 0.1}, 31, 4)],
)
def test_warm_up_is_a_number_of_steps_or_a_share_of_them(how: dict[str, Any], steps: int, expected: int) -> None:
    assert UpdateSettings("adamw", 0.1, 0.0, **how).warmup_steps(steps) == expected


# --- 8 bits ---


def stepped(optimizer: torch.optim.Optimizer, weight: nn.Parameter, seeds: range) -> None:
    for seed in seeds:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()


@pytest.fixture
def weight() -> nn.Parameter:
    """Large enough that bitsandbytes keeps its moments in 8 bits."""
    return nn.Parameter(torch.zeros(128, 64))


def test_8_bits_update_nearly_as_32_and_hold_a_quarter(weight: nn.Parameter) -> None:
    settings, other = UpdateSettings(EIGHT_BIT, 0.01, 0.0), nn.Parameter(weight.detach().clone())
    optimizer = make_optimizer(settings, [weight], lambda: 0.0)
    stepped(optimizer, weight, range(5))
    stepped(make_optimizer(replace(settings, optimizer="adamw"), [other], lambda: 0.0), other, range(5))
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert 0 < (weight - other).norm() < 0.05 * other.norm()


def test_8_bits_resume_to_the_bit(weight: nn.Parameter) -> None:
    settings = UpdateSettings(EIGHT_BIT, 0.01, 0.1)
    whole = make_optimizer(settings, [weight], lambda: 0.0)
    stepped(whole, weight, range(3))
    file = io.BytesIO()
    torch.save({"weight": weight.detach(), "optimizer": whole.state_dict()}, file)
    stepped(whole, weight, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = nn.Parameter(saved["weight"])
    resumed = make_optimizer(settings, [again], lambda: 0.0)
    resumed.load_state_dict(saved["optimizer"])
    stepped(resumed, again, range(3, 6))
    assert torch.equal(again, weight)


@pytest.mark.parametrize(
    ("name", "device", "sharded", "message"),
    [
        (PAGED, "cpu", False, "its pages are for a GPU with too little memory, and this run is on a CPU"),
        (PAGED, "cuda", True, "bitsandbytes cannot update sharded weights; give adamw"),
        (EIGHT_BIT, "cpu", True, "bitsandbytes cannot update sharded weights; give adamw"),
    ],
)
def test_an_optimizer_that_would_not_work_is_refused(name: str, device: str, sharded: bool, message: str) -> None:
    require_works(EIGHT_BIT, torch.device("cpu"), sharded=False)
    require_works("adamw", torch.device("cpu"), sharded=True)
    with pytest.raises(InvalidArgument, match=f"^--optimizer='{name}': {message}"):
        require_works(name, torch.device(device), sharded=sharded)
