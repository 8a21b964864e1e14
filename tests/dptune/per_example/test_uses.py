"""Norms and sums of gradients that are kept as factors, against materialised ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptune import Ledger, PerExampleGradients, PrivateStep
from dptune.per_example import Recorded, uses
from tests.private_sum import NoNoise, config_for, sum_so_far


def add_weighted_sum(use: uses.Outer, total: Tensor, weights: Tensor) -> None:
    for _ in use.adding_weighted_sum(total, weights):
        pass


@pytest.mark.parametrize("left", [3e-3, 3.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("seed", range(5))
def test_an_example_whose_tokens_cancel_is_clipped_like_any_other(left, scale, seed, tmp_path, monkeypatch):
    """Its ghost norm is a small difference of large products. In float32 it was 0, so nothing was clipped."""
    monkeypatch.setattr(uses, "_WORTH", 0)
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(512, 512, bias=False)
    token, pull, rest = (torch.randn(512, generator=generator) for _ in range(3))
    tokens, pulls = token.expand(1, 2, 512) * scale, torch.stack([300 * pull, left * rest - 300 * pull])[None]
    config = config_for(1, clip_norm=1.0)
    with PrivateStep(layer, config, ledger=Ledger(tmp_path / "ledger"), noise=NoNoise(512 * 512)) as step:
        stats = step.backward((layer(tokens) * pulls).sum((1, 2)))
        wanted = torch.linalg.matrix_norm((pulls.double().sum((0, 1)))[:, None] * tokens[0, 0].double())
        assert stats.norms.item() >= wanted.item() * (1 - 1e-6)
        if left == 3.0:  # not too short to be measured
            assert stats.norms.item() <= wanted.item() * (1 + 1e-6)
        assert 0 < sum_so_far(step).norm() <= 1 + 1e-5


def test_a_tied_embedding_whose_uses_cancel_is_clipped_like_any_other():
    """The norms of its uses are large, that of their sum is small, with the rounding errors of the large ones."""
    generator = torch.Generator().manual_seed(0)
    ids, right = torch.tensor([[3]]), 1e4 * torch.randn(1, 1, 64, generator=generator)
    rest = 1e-3 * torch.randn(1, 1, 64, generator=generator)
    one_hot = F.one_hot(ids, 20).float()
    own = [uses.Outer(-one_hot, right, 20), uses.Outer(ids, right + rest, 20)]
    total = torch.zeros(20, 64)
    squared = Recorded({"weight": list(own)}).squared_norms()["weight"]
    Recorded({"weight": list(own)}).add_weighted_sums({"weight": total}, {"weight": squared.rsqrt()})
    exact = (right + rest).double() - right.double()
    assert squared.sqrt() >= exact.norm()
    assert 0 < total.norm() <= 1 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_micro_batch_of_which_no_row_counts_adds_nothing(dtype):
    """A rank without examples left runs a dummy; in bfloat16 its sum of no rows raised an error."""
    weight = uses.Outer(torch.ones(1, 3, 4, dtype=dtype), torch.ones(1, 3, 5, dtype=dtype), 4)
    total = torch.zeros(4, 5)
    Recorded({"weight": [weight]}).add_weighted_sums({"weight": total}, {"weight": torch.zeros(1)})
    assert not total.any()


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 1000)])
def test_norms_are_float32_or_better_whatever_the_factors(dtype, factor):
    """Adding up products of bfloat16 numbers in bfloat16 gave norms that were 0.5% too small. Products of a million
    overflow float16."""
    generator = torch.Generator().manual_seed(0)
    left, right = ((torch.randn(3, 40, size, generator=generator) * factor).to(dtype) for size in (30, 50))
    for use in (uses.Outer(left, right, 30), uses.Outer(torch.randint(0, 9, (3, 40), generator=generator), right, 9)):
        exact = F.one_hot(use.left, 9).double() if use.is_lookup else use.left.double()
        wanted = torch.einsum("btm,btn->bmn", exact, right.double())
        torch.testing.assert_close(use.squared_norms(), wanted.square().sum((1, 2)), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            use.materialised().double() if not use.is_lookup else wanted, wanted, rtol=1e-4, atol=1e-4 * factor**2
        )
        assert (use.lengths() >= wanted.flatten(1).norm(dim=1)).all()
        joined = torch.linalg.vector_norm(wanted.sum(0))
        torch.testing.assert_close(use.folded(3).squared_norms().sqrt()[0], joined, rtol=1e-5, atol=0)
        total = torch.zeros(use.rows, 50)
        add_weighted_sum(use, total, torch.tensor([1.0, 0.5, 2.0]))
        summed = torch.einsum("b,bmn->mn", torch.tensor([1.0, 0.5, 2.0]).double(), wanted)
        torch.testing.assert_close(total.double(), summed, rtol=1e-4, atol=1e-4 * factor**2)


def test_factors_in_lower_precision_are_cast_a_few_examples_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, 7, size, generator=generator).bfloat16() for size in (30, 50))
    use, lookup = uses.Outer(left, right, 30), uses.Outer(torch.randint(0, 30, (5, 7), generator=generator), right, 30)

    def everything() -> list[Tensor]:
        totals = [torch.zeros(30, 50), torch.zeros(30, 50)]
        for one, total in zip((use, lookup), totals, strict=True):
            add_weighted_sum(one, total, torch.arange(1.0, 6, dtype=torch.float64))
        return [use.squared_norms(), lookup.squared_norms(), use.inner_products(lookup), *totals]

    whole = everything()
    monkeypatch.setattr(uses, "_CAST_ELEMENTS", 2 * 7 * 50)
    for found, wanted in zip(everything(), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_norm_by_ghost_products_makes_nothing_of_the_vocabularys_size(monkeypatch):
    """For an embedding of 1,000,000 rows, a dense gradient per example would take 4 GB."""
    layer = nn.Embedding(1_000_000, 1)
    with PerExampleGradients(layer) as recorder:
        layer(torch.tensor([[3, 999_999, 3], [1, 2, 3]])).square().sum((1, 2)).sum().backward()
        monkeypatch.setattr(torch.Tensor, "new_zeros", _small_zeros)
        norms = recorder.take().squared_norms()["weight"]
    rows = layer.weight.detach().double().flatten()
    wanted = [(4 * rows[3]) ** 2 + (2 * rows[999_999]) ** 2, sum((2 * rows[row]) ** 2 for row in (1, 2, 3))]
    torch.testing.assert_close(norms, torch.stack(wanted))


_new_zeros = torch.Tensor.new_zeros


def _small_zeros(self, *size, **how):
    made = _new_zeros(self, *size, **how)
    assert made.numel() < 100
    return made


@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 64, 65, 127, 128, 130, 300])
def test_half_of_the_ghost_products_give_the_whole_norm(monkeypatch, tokens):
    """Terms of two different tokens come twice in the norm, and are computed once."""
    monkeypatch.setattr(uses, "_WORTH_HALVING_CPU", 0)
    left, right = torch.randn(3, tokens, 5), torch.randn(3, tokens, 7)
    found = uses.Outer(left, right, 5).squared_norms()
    wanted = torch.einsum("btm,btn->bmn", left.double(), right.double()).square().sum((1, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_a_large_ghost_norm_takes_five_eighths_of_the_arithmetic(monkeypatch):
    done = []

    def product(left, right):
        done.append(left.shape[1] * right.shape[2])
        return left.new_zeros(2, left.shape[1], right.shape[2])

    monkeypatch.setattr(torch, "bmm", product)
    use = uses.Outer(torch.randn(2, 512, 1), torch.randn(2, 512, 1), 1)
    use.squared_norms()
    assert sum(done) == 2 * 512**2
    done.clear()
    monkeypatch.setattr(uses, "_WORTH_HALVING_CPU", 1 << 20)
    use.squared_norms()
    assert sum(done) == 2 * 512**2 * 5 // 8


def test_both_norms_of_a_lookup_are_those_of_its_gradient():
    """An accelerator takes the one that the host need not wait for. Tokens come several times and not at all."""
    generator = torch.Generator().manual_seed(0)
    ids, grads = torch.randint(0, 6, (3, 40), generator=generator), torch.randn(3, 40, 5, generator=generator)
    wanted = uses.Outer(ids, grads.double(), 9).materialised().square().sum((1, 2))
    for found in (uses._by_distinct_rows(ids, grads, 9), uses._by_equal_tokens(ids, grads, 9)):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
