"""Each test passes for what is stated and finds its fault; the bounds are exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from dptune.audit import checks
from dptune.audit.checks import Finding

ALPHA, STEPS, SIZE, ROWS = 1e-6, 100, 60, 40
HOMES = ["one", "two"] * 10


def normal(seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randn(STEPS, size, generator=torch.Generator().manual_seed(seed))


def random_draws(q: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((STEPS, ROWS)) < q


def everything(noise: Tensor) -> list[Finding]:
    return [
        *checks.noise_everywhere(noise, ALPHA),
        checks.noise_of_tensors(noise, {"first": 20, "second": SIZE - 20}, ALPHA),
        checks.noise_of_pairs("steps", noise[::2], noise[1::2], ALPHA),
        checks.correlated_coordinates(noise, ALPHA),
    ]


def test_honest_noise_is_not_contradicted() -> None:
    for seed in range(20):
        found = everything(normal(seed))
        assert not [one for one in found if one.contradicted]
    assert len(found) == 6


def without(noise: Tensor, part: slice) -> Tensor:
    noise[:, part] = 0
    return noise


def shared(noise: Tensor) -> Tensor:
    noise[:, 1::2] = noise[:, ::2]
    return noise


def hidden_direction(noise: Tensor) -> Tensor:
    dense = torch.linalg.qr(torch.randn(SIZE, 32, generator=torch.Generator().manual_seed(0)))[0][:, :1]
    return noise - (noise @ dense) @ dense.T


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        (lambda noise: without(noise, slice(5, 6)), "every single coordinate"),
        (shared, "neighbouring coordinates"),
        (hidden_direction, "dense"),
        (lambda noise: without(noise, slice(20)), "least in first"),
        (lambda noise: 0.9 * noise, "every trained tensor"),
        (lambda noise: noise[:1].expand(STEPS, -1) * 1.0, "steps"),
        (lambda noise: torch.cat([noise[:, :30], noise[:, :30]], 1), "noise shared by coordinates"),
    ],
)
def test_missing_noise_is_found(fault: Callable[[Tensor], Tensor], found_by: str) -> None:
    contradicted = [one.question for one in everything(fault(normal())) if one.contradicted]
    assert [one for one in contradicted if found_by in one], contradicted


@pytest.mark.parametrize("sign", [1, -1])
def test_pairs_that_share_half_of_their_noise_are_found(sign: int) -> None:
    ones, others, common = (normal(seed) / math.sqrt(2) for seed in range(3))
    finding = checks.noise_of_pairs("launches", ones + common, others + sign * common, ALPHA)
    assert finding.contradicted
    assert not checks.noise_of_pairs("launches", normal(3), normal(4), ALPHA).contradicted


def test_the_bound_on_the_noise_is_that_of_the_chi_squared_distribution() -> None:
    noise = normal()
    finding = checks.noise_of_tensors(noise, {"all": SIZE}, 0.01)
    squares = float(noise.double().square().sum())
    assert chi2.cdf(squares / finding.found**2, noise.numel()) == pytest.approx(0.01)


def played(contribution: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 3, (STEPS, len(HOMES)))
    return counts * contribution + 0.5 * generator.normal(size=counts.shape), counts


def test_contributions_up_to_the_clip_norm_pass_and_larger_ones_do_not() -> None:
    for seed in range(20):
        found = checks.contributions(*played(1.0, seed), HOMES, 0.5, ALPHA)
        assert [(one.contradicted, one.observations > 100) for one in found] == [(False, True)] * 2
    seen, counts = played(1.0, 0)
    seen[:, ::2] += 0.2 * counts[:, ::2]
    first, second = checks.contributions(seen, counts, HOMES, 0.5, ALPHA)
    assert first.contradicted
    assert "mostly in one" in first.question
    assert not second.contradicted


def test_a_layer_whose_units_were_never_drawn_has_no_finding() -> None:
    assert checks.contributions(np.zeros((5, 2)), np.zeros((5, 2)), ["one", "two"], 1.0, ALPHA) == []


@pytest.mark.parametrize("q", [0.02, 0.3, 0.9])
def test_honest_draws_are_not_contradicted(q: float) -> None:
    for seed in range(20):
        drawn, others = random_draws(q, seed), random_draws(q, 100 + seed)
        found = [*checks.draws(drawn, q, ALPHA), *checks.same_draws(drawn, others, q, ALPHA)]
        assert len(found) == 4
        assert not [one for one in found if one.contradicted]


@pytest.mark.parametrize(
    ("drawn", "found_by"),
    [
        (random_draws(0.4), "how often"),
        (np.where(np.arange(ROWS) == 3, True, random_draws(0.3)), "how often"),
        (np.argsort(np.random.default_rng(1).random((STEPS, ROWS)), axis=1) < 12, "size does not vary"),
        (np.repeat(random_draws(0.3)[::2], 2, axis=0), "neighbouring steps"),
    ],
)
def test_wrong_draws_are_found(drawn: np.ndarray, found_by: str) -> None:
    contradicted = [one.question for one in checks.draws(drawn, 0.3, ALPHA) if one.contradicted]
    assert [one for one in contradicted if found_by in one], contradicted


def test_equal_launches_are_found_and_full_batches_are_not_tested() -> None:
    drawn = random_draws(0.3)
    (finding,) = checks.same_draws(drawn, drawn, 0.3, ALPHA)
    assert finding.contradicted
    everyone = np.full((STEPS, ROWS), True)
    assert checks.draws(everyone, 1.0, ALPHA) == checks.same_draws(everyone, everyone, 1.0, ALPHA) == []
