"""DP-Adam subtracts the noise's share of the second moment; low-pass Adam takes that of averaged gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument, PrivateStep
from dptune.optimizers import DPAdam, LowPassAdam
from tests.dptune.test_clipping_styles import CLIP_NORM, STYLES, NoLedger, configured, inputs, losses, model
from tests.private_sum import NoNoise


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator) for _ in range(count)]


def trained(optimizer_of, grads: list[Tensor]) -> Tensor:
    parameter = nn.Parameter(torch.ones(5))
    optimizer = optimizer_of([parameter])
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def test_without_noise_it_is_adamw() -> None:
    found = trained(lambda p: DPAdam(p, lambda: 0.0, lr=0.01, weight_decay=0.1, floor=1e-8), gradients(20))
    wanted = trained(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=0.0), gradients(20))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_variance_of_the_noise_is_taken_from_the_second_moment() -> None:
    """By hand, with noise that changes between steps, as with an adaptive clip norm."""
    stds, grads = [0.5, 0.1, 0.8], gradients(3)
    seen = iter(stds)
    found = trained(lambda p: DPAdam(p, lambda: next(seen), lr=0.01, floor=1e-3), grads)
    mean, square, noise, wanted = torch.zeros(5), torch.zeros(5), 0.0, torch.ones(5)
    for step, (grad, std) in enumerate(zip(grads, stds, strict=True), start=1):
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        noise = 0.999 * noise + 0.001 * std**2
        corrected = (square - noise) / (1 - 0.999**step)
        wanted = wanted - 0.01 * mean / (1 - 0.9**step) / corrected.clamp_min(0).sqrt().clamp_min(1e-3)
    torch.testing.assert_close(found, wanted)


def test_under_much_noise_steps_are_larger_where_the_gradient_is() -> None:
    """Adam divides all coordinates by about the noise. Without this bias, a weak coordinate catches up."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.tensor([1.0, 0.1, 1.0, 0.1, 1.0])
    grads = [signal + 2.0 * torch.randn(5, generator=generator) for _ in range(3000)]
    moved = 1 - trained(lambda p: DPAdam(p, lambda: 2.0, lr=1e-3, floor=1e-1), grads)
    adam = 1 - trained(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0), grads)
    assert moved.mean() > 1.5 * adam.mean()


def test_its_state_is_saved_and_restored() -> None:
    grads = gradients(6)
    whole = trained(lambda p: DPAdam(p, lambda: 0.3, lr=0.01), grads)
    parameter = nn.Parameter(torch.ones(5))
    first = DPAdam([parameter], lambda: 0.3, lr=0.01)
    for number, grad in enumerate(grads):
        if number == 3:
            second = DPAdam([parameter], lambda: 0.3, lr=0.5)
            second.load_state_dict(first.state_dict())
            first = second
        parameter.grad = grad.clone()
        first.step()
    assert torch.equal(parameter.detach(), whole)


def test_low_pass_adam_divides_by_the_root_mean_square_of_averages() -> None:
    """By hand."""
    grads = gradients(4)
    found = trained(lambda p: LowPassAdam(p, lr=0.1, betas=(0.5, 0.8), weight_decay=0.2), grads)
    mean, square, wanted = torch.zeros(5), torch.zeros(5), torch.ones(5)
    for step, grad in enumerate(grads, start=1):
        mean = 0.5 * mean + 0.5 * grad
        whole = mean / (1 - 0.5**step)
        square = 0.8 * square + 0.2 * whole**2
        wanted = wanted * (1 - 0.1 * 0.2) - 0.1 * whole / (square / (1 - 0.8**step)).sqrt()
    torch.testing.assert_close(found, wanted)


def test_under_correlated_noise_low_pass_adam_moves_further_along_the_gradient() -> None:
    """Noise that the next step takes back is in every gradient, and hardly in their average."""
    signal, noise = torch.tensor([1.0, 0.1, 1.0, 0.1, 1.0]), 5 * torch.randn(2000, 5)
    grads = [signal + one - before for one, before in zip(noise[1:], noise, strict=False)]
    moved = 1 - trained(lambda p: LowPassAdam(p, lr=1e-3), grads)
    adam = 1 - trained(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0), grads)
    assert (moved > 3 * adam).all()


def test_low_pass_adam_is_saved_and_restored() -> None:
    grads, parameter = gradients(6), nn.Parameter(torch.ones(5))
    first = LowPassAdam([parameter], lr=0.01)
    for number, grad in enumerate(grads):
        if number == 3:
            second = LowPassAdam([parameter], lr=0.5)
            second.load_state_dict(first.state_dict())
            first = second
        parameter.grad = grad.clone()
        first.step()
    assert torch.equal(parameter.detach(), trained(lambda p: LowPassAdam(p, lr=0.01), grads))


@pytest.mark.parametrize("style", ["flat", "adaptive"])
def test_the_step_says_how_much_noise_its_gradient_has(style: str) -> None:
    own, config = model(), configured(STYLES[style])
    with PrivateStep(own, config, ledger=NoLedger(), noise=NoNoise(43 + (style == "adaptive"))) as step:
        for _ in range(2):
            used = step.clip_norm
            step.backward(losses(own, inputs()))
            step.finish()
            std = config.noise_std_per_rank(1, used) / config.expected_batch_size
            assert step.gradient_noise_std() == pytest.approx(std)
        assert (used != CLIP_NORM) == (style == "adaptive")


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 0.1, "floor": 0.0}, {"lr": 0.1, "betas": (1.0, 0.9)}])
def test_settings_out_of_range_are_refused(bad) -> None:
    with pytest.raises(InvalidArgument):
        DPAdam([nn.Parameter(torch.ones(1))], lambda: 0.0, **bad)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 0.1, "eps": 0.0}, {"lr": 0.1, "betas": (0.9, 1.0)}])
def test_settings_of_low_pass_adam_out_of_range_are_refused(bad) -> None:
    with pytest.raises(InvalidArgument):
        LowPassAdam([nn.Parameter(torch.ones(1))], **bad)
