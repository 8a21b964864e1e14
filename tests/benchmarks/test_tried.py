"""Optimizers that were tried do what their names say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.tried import FloorAdam, Orthogonal, ShrunkAdam, optimizer_tried, shrunk
from utils.training import loop
from utils.training.optimizers import UpdateSettings


def test_shrinkage_takes_noise_off_and_leaves_strong_values() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 90, generator=generator, dtype=torch.float64)
    assert shrunk(0.98 * noise, 1.0)[1][1:].max() == 0
    signal = 100.0 * torch.ones(60, 90, dtype=torch.float64)
    u, values, v = shrunk(signal + noise, 1.0)
    assert int((values > 0).sum()) == 1
    assert float((u * values @ v - signal).norm()) < float(noise.norm()) / 3
    assert torch.allclose(shrunk(noise, 0.0)[1], torch.linalg.svdvals(noise))


def test_muon_moves_every_direction_alike() -> None:
    matrix, bias = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4))
    matrix.grad, bias.grad = torch.randn(6, 4), torch.ones(4)
    Orthogonal([matrix, bias], lambda: 0.0, lr=0.5, shrink=False, momentum=0.9).step()
    assert torch.allclose(torch.linalg.svdvals(matrix.detach()), torch.full((4,), 0.5 * math.sqrt(1.5)), atol=1e-5)
    assert torch.allclose(bias.detach(), torch.full((4,), -0.5), atol=1e-4)


def test_shrinking_optimizers_do_not_move_along_noise() -> None:
    for kind in ("muon", "adam"):
        matrix = nn.Parameter(torch.zeros(50, 80))
        matrix.grad = 0.9 * torch.randn(50, 80, generator=torch.Generator().manual_seed(1))
        noise = lambda: 1.0  # noqa: E731
        optimizer = (
            Orthogonal([matrix], noise, lr=1.0, shrink=True, momentum=0.9)
            if kind == "muon"
            else ShrunkAdam([matrix], noise, lr=1.0)
        )
        optimizer.step()
        assert float(matrix.detach().abs().max()) == 0


def test_floor_adam_never_divides_by_less_than_noise_leaves() -> None:
    one = nn.Parameter(torch.zeros(1))
    one.grad = torch.tensor([1.0])
    FloorAdam([one], lambda: 1.0, lr=1.0, betas=(0.9, 0.99)).step()
    assert one.item() == pytest.approx(-1 / (2 * 0.01 / 1.99) ** 0.25, rel=1e-5)


def test_loops_make_the_optimizer_that_is_tried() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    settings = UpdateSettings("adamw", 0.1, 0.0)
    for name in ("muon", "adam-shrunk", "lowpass-adam-0.9-0.99", "floor-adam-0.9-0.99", "dp-adam-floor-0.1"):
        with optimizer_tried(name):
            assert type(loop.make_optimizer(settings, [parameter], lambda: 0.0)) is not torch.optim.AdamW
    with optimizer_tried("adam-betas-0.8-0.9"):
        assert loop.make_optimizer(settings, [parameter], lambda: 0.0).defaults["betas"] == (0.8, 0.9)
    with optimizer_tried("nothing"), pytest.raises(ValueError, match="not known"):
        loop.make_optimizer(settings, [parameter], lambda: 0.0)
    assert type(loop.make_optimizer(settings, [parameter], lambda: 0.0)) is torch.optim.AdamW
