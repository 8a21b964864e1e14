"""The sum of a step whose trained parameters every rank holds whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dptune.per_example import Outer, Recorded
from dptune.step_sums import WholeSum
from tests.ranks import run_ranks

PARAMETERS = {"weight": nn.Parameter(torch.zeros(2, 3)), "bias": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}
ONES = {"weight": torch.ones(1), "bias": torch.ones(1)}


def recorded(scale: float = 1.0) -> Recorded:
    """One example of one token, with a gradient of `scale` everywhere."""
    left, right = torch.full((1, 1, 2), scale), torch.ones(1, 1, 3)
    return Recorded({"weight": [Outer(left, right, 2)], "bias": [left[:, 0]]})


def test_micro_batches_and_counts_add_up_in_float64() -> None:
    sums = WholeSum(PARAMETERS, 9)
    sums.begin()
    sums.add(recorded(), ONES)
    sums.add(recorded(2.0**-40), ONES)  # float32 would lose it
    sums.add_count(torch.tensor(0.5, dtype=torch.float64))
    taken = sums.taken()
    assert taken.dtype == torch.float64
    assert taken.tolist() == [1 + 2.0**-40] * 8 + [0.5]
    assert sums.count(taken) == 0.5


def test_a_step_begins_at_zero_and_its_sum_is_taken_once() -> None:
    sums = WholeSum(PARAMETERS, 8)
    for _ in range(2):
        sums.begin()
        sums.add(recorded(), ONES)
        assert sums.taken().tolist() == [1.0] * 8
        with pytest.raises(RuntimeError, match="no sum that has begun"):
            sums.taken()


def test_a_rank_without_gradients_adds_nothing() -> None:
    sums = WholeSum(PARAMETERS, 8)
    sums.begin()
    sums.add(recorded(), ONES)
    sums.add_nothing()
    assert sums.taken().tolist() == [1.0] * 8


def test_no_parameter_has_a_gradient_before_the_step_writes_one() -> None:
    sums = WholeSum(PARAMETERS, 8)
    sums.begin()
    sums.add(recorded(), ONES)
    assert all(parameter.grad is None for parameter in PARAMETERS.values())


def test_gradients_have_the_parameters_shapes_and_types() -> None:
    sums = WholeSum(PARAMETERS, 8)
    found = sums.gradients(torch.arange(8.0))
    assert found["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["bias"].tolist() == [6, 7]
    assert {name: part.dtype for name, part in found.items()} == {
        name: parameter.dtype for name, parameter in PARAMETERS.items()
    }


def test_ranks_add_their_noisy_sums_and_each_has_a_share_of_the_noise() -> None:
    def work(rank: int, gather: object) -> tuple[Tensor, int]:
        sums = WholeSum(PARAMETERS, 8, gather=gather, world_size=3)  # type: ignore[arg-type]
        return sums.over_ranks(torch.full((8,), float(rank + 1), dtype=torch.float64)), sums.noises

    for total, noises in run_ranks(3, work):
        assert total.tolist() == [6.0] * 8
        assert noises == 3
