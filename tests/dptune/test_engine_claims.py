"""Claims of the privacy guarantee that concern several modules."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import GaussianNoise, InvalidArgument, Keystream, Ledger, PoissonSampler, PrivacyConfig, PrivateStep
from dptune.accounting import Spend
from tests.private_sum import NoNoise


def config(clip_norm: float = 1.0, noise_multiplier: float = 1.0) -> PrivacyConfig:
    return PrivacyConfig(
        num_examples=100,
        expected_batch_size=4.0,
        steps=9,
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
        delta=1e-4,
    )


def no_noise(size: int) -> Any:
    return NoNoise(size)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.mark.parametrize("size", [1, 299, 301])
def test_noise_of_another_size_than_the_model_is_refused(ledger: Ledger, size: int) -> None:
    """A vector of one value would be broadcast, and the same number added to every parameter hides nothing."""
    with GaussianNoise(size) as noise, pytest.raises(InvalidArgument, match=f"noise={size}: .* 300 values"):
        PrivateStep(nn.Linear(20, 15, bias=False), config(), ledger=ledger, noise=noise)


@pytest.mark.parametrize(("clip_norm", "sigma"), [(0.1, 1.0), (3.0, 1.0), (0.5, 2.5)])
@pytest.mark.parametrize("micro_batches", [0, 1, 7])
def test_what_is_added_is_sigma_c_once_a_step(
    ledger: Ledger, clip_norm: float, sigma: float, micro_batches: int
) -> None:
    """For any clip norm and any number of `backward` calls. The known part of the data is subtracted."""
    model, settings = nn.Linear(200, 200, bias=False), config(clip_norm, sigma)
    with PrivateStep(model, settings, ledger=ledger, noise=GaussianNoise(40_000, Keystream.for_tests(1))) as step:
        for _ in range(micro_batches):
            step.backward(model(torch.zeros(3, 200)).sum(1))  # an input of zero: a gradient of zero
        step.finish()
    assert model.weight.grad is not None
    added = model.weight.grad.flatten().double() * settings.divisor
    n = len(added)
    assert abs(added.std() / (sigma * clip_norm) - 1) < 5 / (2 * n) ** 0.5
    assert abs(added.mean() / (sigma * clip_norm)) < 5 / n**0.5
    assert ledger.steps == 1


def test_a_step_starts_from_nothing_after_the_last(ledger: Ledger) -> None:
    model = nn.Linear(3, 2)
    released = []
    with PrivateStep(model, config(), ledger=ledger, noise=no_noise(8)) as step:
        for _ in range(2):
            step.backward(model(torch.ones(2, 3)).sum(1))
            step.finish()
            released.append(model.weight.grad)
        step.finish()  # an empty draw after full ones
        empty = model.weight.grad
    assert released[0] is not None
    assert released[0].any()
    torch.testing.assert_close(*released)
    assert empty is not None
    assert not empty.any()


def test_the_divisor_is_the_expected_batch_size_however_many_were_drawn(ledger: Ledger) -> None:
    released = {}
    for drawn in (1, 4, 8):
        model = nn.Linear(3, 2, bias=False)
        with PrivateStep(model, config(100.0), ledger=ledger, noise=no_noise(6)) as step:
            step.backward(model(torch.ones(drawn, 3)).sum(1))
            step.finish()
        assert model.weight.grad is not None
        released[drawn] = model.weight.grad
    torch.testing.assert_close(released[4], torch.ones(2, 3))
    torch.testing.assert_close(released[8], 2 * released[4])
    torch.testing.assert_close(released[1], released[4] / 4)


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 30 * self.large(x) + 0.1 * self.small(x)


def test_an_examples_layers_are_clipped_together(ledger: Ledger) -> None:
    """Clipped separately, each of two layers could have norm C, so that the gradient would have norm sqrt(2) C."""
    torch.manual_seed(0)
    model, x = _TwoLayers(), torch.randn(1, 4)
    size = sum(parameter.numel() for parameter in model.parameters())
    with PrivateStep(model, config(0.7), ledger=ledger, noise=no_noise(size)) as step:
        step.backward(model(x).sum(1))
        step.finish()
    grads = [parameter.grad for parameter in model.parameters()]
    released = torch.cat([grad.flatten() for grad in grads if grad is not None]) * 4.0
    assert released.norm().item() == pytest.approx(0.7, rel=1e-5)
    assert model.large.bias.grad is not None
    assert model.small.bias.grad is not None
    torch.testing.assert_close(model.large.bias.grad / model.small.bias.grad, torch.full((4,), 300.0))


def test_the_ledger_records_the_settings_that_ran(ledger: Ledger) -> None:
    settings = config(0.3, 1.7)
    with PrivateStep(nn.Linear(2, 2), settings, ledger=ledger) as step:
        for _ in range(3):
            step.finish()
    assert ledger.spends == [Spend(1.7, 0.04, 3)]
    assert '"clip_norm": 0.3' in ledger.path.read_text()


def test_sampling_and_noise_are_different_streams() -> None:
    """Sampler and noise have separate keys. Draws that follow from the noise would not be secret."""
    sampler, noises = PoissonSampler(10, 0.5), [GaussianNoise(4) for _ in range(2)]
    streams = [sampler.keystream, *(noise.keystream for noise in noises)]
    for noise in noises:
        noise.close()
    assert all(stream.secret for stream in streams)
    words = [stream.words(4) for stream in streams]
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(words, 2))
