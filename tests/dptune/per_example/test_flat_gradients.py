"""The buffer of the adapters' per-example gradients: products, norms and sums, against one example at a time."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument, PerExampleGradients, add_lora
from dptune.flat import views
from dptune.lora import adapters
from dptune.per_example.flat_gradients import BLOCK, FlatGradients, Layout, add_to_totals, squared_norms_of
from tests.reference import flat, oracle

B, T = 3, 5
SIZES = {"a": (2, 7), "b": (4, 2), "c": (3, 3), "d": (5, 1)}


def layout() -> Layout:
    return Layout({name: nn.Parameter(torch.empty(size)) for name, size in SIZES.items()})


def factors(name: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 100 + ord(name))
    rows, columns = SIZES[name]
    return torch.randn(B, T, rows, generator=generator), torch.randn(B, T, columns, generator=generator)


def product(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("btm,btn->bmn", left.double(), right.double())


def filled(*names: str) -> tuple[FlatGradients, dict[str, Tensor]]:
    """A buffer full of nan before, and the gradients that were added to it."""
    made = FlatGradients.empty(layout(), B, torch.empty(0))
    made.values.fill_(float("nan"))
    for name in names:
        made.add_product(name, *factors(name))
    return made.finished(), {name: product(*factors(name)) for name in names}


def test_uses_of_a_parameter_add_up_and_unused_ones_are_zero() -> None:
    made, wanted = filled("a", "c")
    made.add_product("c", *factors("c", 1))
    wanted["c"] += product(*factors("c", 1))
    found = made.materialised()
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-5, atol=1e-6)
    assert made.values[:, 14:22].eq(0).all()
    assert made.values[:, 31:].eq(0).all()


def test_factors_of_less_than_float32_are_multiplied_in_float32() -> None:
    made = FlatGradients.empty(layout(), B, torch.empty(0, dtype=torch.bfloat16))
    left, right = (part.bfloat16() for part in factors("a"))
    made.add_product("a", left, right)
    assert made.values.dtype == torch.float32
    torch.testing.assert_close(made.materialised()["a"].double(), product(left, right), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", ["abcd", "acd", "b"])
@pytest.mark.parametrize("groups", [dict.fromkeys("abcd", "all"), {"a": "x", "b": "x", "c": "y", "d": "x"}])
def test_norms_of_groups_are_of_all_their_used_parameters(names: str, groups: dict[str, str]) -> None:
    made, wanted = filled(*names)
    found: dict[str, Tensor] = {}
    for group, squared in made.squared_norms(groups):
        assert squared.dtype == torch.float64
        found[group] = found.get(group, 0) + squared
    for group in {groups[name] for name in names}:
        own = [wanted[name].square().sum((1, 2)) for name in names if groups[name] == group]
        torch.testing.assert_close(found.pop(group), torch.stack(own).sum(0), rtol=1e-6, atol=0)
    assert not found


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK * 3 // 2, 3 * BLOCK, 300 * BLOCK + 5])
def test_norms_of_many_values_are_exact(size: int) -> None:
    """One float32 sum of 20 million squares is 1e-3 too small."""
    values = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(squared_norms_of([values])[0], values.double().square().sum(1), rtol=1e-6, atol=0)


def test_units_of_several_rows_are_summed() -> None:
    made = FlatGradients(layout(), torch.arange(4.0)[:, None].expand(4, 36).clone(), set("abcd"))
    assert made.folded(2).values[:, 0].tolist() == [1.0, 5.0]


@pytest.mark.parametrize("together", [True, False])
def test_weighted_sums_skip_examples_of_weight_0(together: bool) -> None:
    made, wanted = filled("a", "b", "d")
    made.values[1] = float("inf")
    weights_B = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    given = dict.fromkeys("abcd", weights_B) if together else {n: weights_B.clone() for n in "abd"}
    totals = {name: torch.ones(size, dtype=torch.float64) for name, size in SIZES.items()}
    parts = list(made.weighted_sums(given))
    assert [names for names, _ in parts] == ([list("abcd")] if together else [["a"], ["b"], ["d"]])
    for names, values in parts:
        add_to_totals(totals, names, values)
    for name, total in totals.items():
        own = torch.einsum("b,bmn->mn", weights_B[[0, 2]], wanted[name][[0, 2]]) if name in wanted else 0
        torch.testing.assert_close(total, torch.ones(SIZES[name], dtype=torch.float64) + own, rtol=1e-5, atol=1e-6)


def test_totals_behind_one_another_are_added_to_at_once_and_others_one_by_one() -> None:
    parameters = {name: nn.Parameter(torch.empty(size)) for name, size in SIZES.items()}
    together = torch.zeros(36, dtype=torch.float64)
    apart = {name: torch.zeros(size) for name, size in SIZES.items()}
    turned = views(parameters, torch.zeros(36)) | {"a": torch.zeros(7, 2).t()}
    values = torch.arange(36.0)
    for totals in (views(parameters, together), apart, turned):
        add_to_totals(totals, list(SIZES), values)
        assert torch.equal(torch.cat([total.flatten() for total in totals.values()]).float(), values)
    assert torch.equal(together.float(), values)
    half = torch.zeros(36)
    add_to_totals(views(parameters, half), ["b", "c"], values[:17])
    assert half.tolist() == [0.0] * 14 + values[:17].tolist() + [0.0] * 5


class _Shared(nn.Module):
    """Uses one adapted layer twice and, on request, not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.seldom, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor, seldom: bool) -> Tensor:
        x = self.twice(self.twice(x).tanh())
        return self.out(self.seldom(x) if seldom else x).square().mean((1, 2))


@pytest.mark.parametrize("frozen", ["", "A", "B"])
def test_adapters_record_what_autograd_gives_one_example_at_a_time(frozen: str) -> None:
    torch.manual_seed(0)
    model = _Shared()
    add_lora(model, rank=2, alpha=3.0, targets=["twice", "seldom"])
    for _, adapter in adapters(model):
        nn.init.normal_(adapter.B.weight)
        if frozen:
            getattr(adapter, frozen).requires_grad_(False)
    rows, exact = torch.randn(B, T, 6), oracle(model)
    with PerExampleGradients(model) as recorder:
        for seldom in (True, False, True):
            model(rows, seldom).sum().backward()
            recorded = recorder.take()
            made, norms = recorded.materialised(), recorded.squared_norms()
            assert made.keys() == norms.keys()
            for number, row in enumerate(rows.double()):
                trained = {name: p for name, p in exact.named_parameters() if p.requires_grad}
                grads = torch.autograd.grad(exact(row[None], seldom)[0], list(trained.values()), allow_unused=True)
                wanted = {name: grad for name, grad in zip(trained, grads, strict=True) if grad is not None}
                assert made.keys() == wanted.keys()
                for name, grad in wanted.items():
                    torch.testing.assert_close(made[name][number].double(), grad, rtol=1e-4, atol=1e-6)
                found = sum(squared[number] for squared in norms.values())
                assert found.item() == pytest.approx(flat(wanted).square().sum().item(), rel=1e-5)
    assert all(adapter.recorder is None for _, adapter in adapters(model))


def test_a_weight_of_an_adapter_and_of_another_layer_is_refused() -> None:
    model = _Shared()
    add_lora(model, rank=6, alpha=3.0, targets=["twice"])
    model.out = nn.Linear(6, 6, bias=False)
    model.out.weight = model.twice.lora.A.weight
    with pytest.raises(InvalidArgument, match="is an adapter's weight and another layer's"):
        PerExampleGradients(model)


def test_an_evaluation_in_inference_mode_before_the_first_step_changes_nothing() -> None:
    model = _Shared()
    add_lora(model, rank=2, alpha=3.0, targets=["twice"])
    with PerExampleGradients(model) as recorder:
        with torch.inference_mode():
            model(torch.randn(B, T, 6), False)
        assert not recorder.take()
        assert not recorder._anchors, "it would be a tensor of the inference mode"
        model(torch.randn(B, T, 6), False).sum().backward()
        assert recorder.take()


def test_a_copy_that_is_made_while_gradients_are_recorded_is_not_recorded() -> None:
    model = _Shared()
    add_lora(model, rank=2, alpha=3.0, targets=["twice"])
    with PerExampleGradients(model) as recorder:
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.twice.lora))):
            assert all(adapter.recorder is None for _, adapter in adapters(copied))
        assert model.twice.lora.recorder is not None
        assert not recorder.take()


def test_two_recorders_do_not_share_a_models_adapters() -> None:
    model = _Shared()
    add_lora(model, rank=2, alpha=3.0, targets=["twice"])
    first, second = PerExampleGradients(model), PerExampleGradients(model)
    with first, pytest.raises(RuntimeError, match="already recording"):
        second.__enter__()
