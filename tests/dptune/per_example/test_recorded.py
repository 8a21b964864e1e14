"""What was recorded, measured and added up, against gradients that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dptune.per_example import HalfAdded, Outer, Recorded

B, T, M, N = 4, 3, 5, 6


def factors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(left [B, T, M], tokens [B, T], right [B, T, N])."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(B, T, size, generator=generator) for size in (M, N))
    return left, torch.randint(0, M, (B, T), generator=generator), right


def of_a_tied_matrix() -> tuple[Recorded, Tensor]:
    """A matrix that is used as a layer twice and as a lookup, and its gradients [B, M, N]."""
    (one, ids, right), (two, _, other) = factors(), factors(1)
    uses = [Outer(one, right, M), Outer(two, other, M), Outer(ids, right, M)]
    lefts = [(one, right), (two, other), (F.one_hot(ids, M).float(), right)]
    return Recorded({"tied": list(uses)}), sum(torch.einsum("btm,btn->bmn", *pair) for pair in lefts)


def test_a_tied_parameters_norm_is_of_the_sum_of_its_uses() -> None:
    recorded, wanted = of_a_tied_matrix()
    torch.testing.assert_close(recorded.materialised()["tied"], wanted)
    torch.testing.assert_close(
        recorded.squared_norms()["tied"], wanted.double().square().sum((1, 2)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("units", [1, 2])
def test_what_is_summed_is_what_was_measured(units: int) -> None:
    recorded, wanted = of_a_tied_matrix()
    folded, weights = recorded.folded(units), torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)[: B // units]
    of_units = wanted.unflatten(0, (-1, units)).sum(1)
    torch.testing.assert_close(
        folded.squared_norms()["tied"], of_units.double().square().sum((1, 2)), rtol=1e-5, atol=0
    )
    total = torch.ones(M, N)
    folded.add_weighted_sums({"tied": total}, {"tied": weights})
    torch.testing.assert_close(total, 1 + torch.einsum("b,bmn->mn", weights.float(), of_units))
    assert not folded, "what was recorded is gone"


def test_a_unit_of_made_gradients_is_their_sum() -> None:
    made = torch.randn(B, 7, generator=torch.Generator().manual_seed(0))
    squared = Recorded({"bias": [made]}).folded(2).squared_norms()["bias"]
    torch.testing.assert_close(squared, (made[0::2] + made[1::2]).double().square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["made", "factors"])
def test_an_example_with_weight_0_is_left_out_and_spoils_nothing(kind: str) -> None:
    left, _, right = factors()
    right[1] = torch.inf
    outer = Outer(left, right, M)
    total, weights = torch.zeros(M, N), torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    use = outer if kind == "factors" else outer.materialised()
    Recorded({"w": [use]}).add_weighted_sums({"w": total}, {"w": weights})
    keep = [0, 2, 3]
    torch.testing.assert_close(total, torch.einsum("btm,btn->mn", left[keep], right[keep]))


@pytest.mark.parametrize(("fails_at", "error"), [(0, RuntimeError), (1, HalfAdded)])
def test_memory_that_runs_out_after_a_product_spoils_the_sum_and_before_it_does_not(
    fails_at: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, _, right = factors()
    totals = {name: torch.zeros(M, N) for name in "ab"}
    adding, calls = Outer.adding_weighted_sum, iter(range(9))

    def fail(self: Outer, total: Tensor, weights: Tensor) -> object:
        if next(calls) == fails_at:
            raise RuntimeError("out of memory")
        return adding(self, total, weights)

    monkeypatch.setattr(Outer, "adding_weighted_sum", fail)
    recorded = Recorded({name: [Outer(left, right, M)] for name in "ab"})
    with pytest.raises(error) as caught:
        recorded.add_weighted_sums(totals, dict.fromkeys("ab", torch.ones(B, dtype=torch.float64)))
    assert type(caught.value) is error
    assert all(not total.any() for total in totals.values()) == (fails_at == 0)
