"""Norms, factors and the sum, each compared with a few lines of float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dptune import InvalidArgument
from dptune.clipping import clip_factors, whole_norms
from dptune.per_example import Recorded


def gradients(examples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}
    return {name: torch.randn(examples, *shape, generator=generator) for name, shape in shapes.items()}


def flattened(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten(1) for grad in grads.values()], dim=1).double()


def recorded(grads: dict[str, Tensor]) -> Recorded:
    return Recorded({name: [grad] for name, grad in grads.items()})


def norms_of(grads: dict[str, Tensor]) -> Tensor:
    return whole_norms(recorded(grads).squared_norms())


def totals_of(flat: Tensor, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of `flat` in the parameters' shapes."""
    parts = flat.split([grad[0].numel() for grad in grads.values()])
    return {name: part.view(grads[name].shape[1:]) for name, part in zip(grads, parts, strict=True)}


def add_clipped_sum(flat: Tensor, grads: dict[str, Tensor], factors: Tensor) -> None:
    recorded(grads).add_weighted_sums(totals_of(flat, grads), dict.fromkeys(grads, factors))


def test_the_norm_is_of_all_parameters_together_in_float64() -> None:
    grads = gradients()
    norms = norms_of(grads)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, flattened(grads).norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 3_000_000])
def test_the_norm_of_a_large_gradient_is_not_under_its_true_value(size: int) -> None:
    """Summing millions of squares in float32 loses the small ones: with 3 million, the norm was 5e-5 too small."""
    grads = {"a": torch.randn(1, size, generator=torch.Generator().manual_seed(0))}
    torch.testing.assert_close(norms_of(grads), grads["a"].double().norm(dim=1), rtol=1e-6, atol=0)


@given(norm=st.floats(0, 1e30), clip_norm=st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_a_factor_is_at_most_one_and_brings_the_norm_to_at_most_the_clip_norm(norm: float, clip_norm: float) -> None:
    factor = clip_factors(torch.tensor([norm], dtype=torch.float64), clip_norm).item()
    assert 0 <= factor <= 1
    assert factor * norm <= clip_norm * (1 + 1e-12)
    assert factor == 1 or factor * norm >= clip_norm * (1 - 1e-12)  # not clipped more than necessary


def test_a_norm_of_zero_and_one_that_is_not_finite() -> None:
    norms = torch.tensor([0.0, math.inf, math.nan, 1e-300], dtype=torch.float64)
    assert clip_factors(norms, 1.0).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_cannot_be_is_refused(clip_norm: float) -> None:
    with pytest.raises(InvalidArgument, match=f"clip_norm={clip_norm}: "):
        clip_factors(torch.ones(1), clip_norm)


def test_the_sum_is_added_to_what_is_there() -> None:
    grads, factors = gradients(), torch.tensor([1.0, 0.25, 0.0, 0.5], dtype=torch.float64)
    total = torch.ones(flattened(grads).shape[1])
    add_clipped_sum(total, grads, factors)
    torch.testing.assert_close(total.double(), 1 + factors @ flattened(grads), rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_keeps_its_place() -> None:
    grads = gradients()
    total = torch.zeros(flattened(grads).shape[1])
    totals = totals_of(total, grads)
    recorded({"c": grads["c"]}).add_weighted_sums(totals, {"c": torch.ones(4, dtype=torch.float64)})
    assert not totals["a"].any()
    assert not totals["b"].any()
    torch.testing.assert_close(totals["c"], grads["c"].sum(0))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_example_that_is_not_finite_is_left_out_whole(bad: float) -> None:
    grads = gradients()
    grads["b"][2, 3] = bad
    factors = clip_factors(norms_of(grads), 1.0)
    assert factors[2] == 0
    total = torch.zeros(flattened(grads).shape[1])
    add_clipped_sum(total, grads, factors)
    others = {name: grad[[0, 1, 3]] for name, grad in grads.items()}
    torch.testing.assert_close(total.double(), factors[[0, 1, 3]] @ flattened(others), rtol=1e-5, atol=1e-6)


def test_all_examples_left_out_leave_nothing() -> None:
    grads = {name: torch.full_like(grad, math.nan) for name, grad in gradients().items()}
    total = torch.zeros(30)
    add_clipped_sum(total, grads, clip_factors(norms_of(grads), 1.0))
    assert not total.any()


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_sum_that_runs_out_of_memory_half_way_adds_nothing(
    done: int, left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads, calls = gradients(), []
    factors = torch.tensor([1.0, 0.25, 0.0 if left_out else 0.75, 0.5], dtype=torch.float64)
    product = Tensor.__matmul__

    def matmul(one: Tensor, other: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > done:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return product(one, other)

    monkeypatch.setattr("dptune.per_example.recorded._SMALL", 0)  # one product for each parameter
    total = torch.full((30,), 7.0)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__matmul__", matmul)
        with pytest.raises(torch.OutOfMemoryError):
            add_clipped_sum(total, grads, factors)
    assert (total == 7).all()
    add_clipped_sum(total, grads, factors)
    torch.testing.assert_close(total.double(), 7 + factors @ flattened(grads), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10_000), scale=st.floats(-20, 20), clip_norm=st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_no_example_adds_more_than_the_clip_norm(seed: int, scale: float, clip_norm: float) -> None:
    grads = {name: grad * 10.0**scale for name, grad in gradients(1, seed).items()}
    total = torch.zeros(flattened(grads).shape[1])
    add_clipped_sum(total, grads, clip_factors(norms_of(grads), clip_norm))
    assert total.double().norm() <= clip_norm * (1 + 1e-6)
