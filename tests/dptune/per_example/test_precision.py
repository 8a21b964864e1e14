"""Norms and sums use the precision of their tensors, whatever the training loop has set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dptune import Ledger, PrivateStep
from dptune.per_example import full_precision, uses
from tests.private_sum import NoNoise, config_for, sum_so_far

MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def fast_matmuls():
    """The settings of `torch.set_float32_matmul_precision("medium")`."""
    before = [backend.fp32_precision for backend in MATMULS]
    for backend, precision in zip(MATMULS, ("tf32", "bf16"), strict=True):
        backend.fp32_precision = precision
    yield
    for backend, precision in zip(MATMULS, before, strict=True):
        backend.fp32_precision = precision


def precisions() -> tuple[str, ...]:
    return tuple(backend.fp32_precision for backend in MATMULS)


def one_micro_batch(tmp_path, kept: str, *, autocast: bool, monkeypatch) -> tuple[Tensor, Tensor]:
    """(norms, clipped sum) of a micro-batch of five, with or without autocast in the backward pass only."""
    monkeypatch.setattr(uses, "_WORTH", {"factors": 0, "made": 1 << 20}[kept])
    torch.manual_seed(0)
    layer = nn.Linear(48, 40)
    tokens, pulls = torch.randn(5, 30, 48), torch.randn(5, 30, 40)
    ledger = Ledger(tmp_path / f"ledger {autocast}")
    with PrivateStep(layer, config_for(5, clip_norm=1.0), ledger=ledger, noise=NoNoise(49 * 40)) as step:
        losses = (layer(tokens) * pulls).sum((1, 2))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stats = step.backward(losses)
        return stats.norms, sum_so_far(step).clone()


@pytest.mark.parametrize("kept", ["factors", "made"])
def test_a_step_in_autocast_measures_and_adds_as_one_outside(kept, tmp_path, monkeypatch):
    """In bfloat16, norms were up to 0.4% too small, so clipped gradients were too long."""
    inside = one_micro_batch(tmp_path, kept, autocast=True, monkeypatch=monkeypatch)
    outside = one_micro_batch(tmp_path, kept, autocast=False, monkeypatch=monkeypatch)
    for found, wanted in zip(inside, outside, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("fast_matmuls")
@pytest.mark.parametrize("kept", ["factors", "made"])
def test_float32_products_are_float32_while_norms_and_sums_are_made(kept, tmp_path, monkeypatch):
    seen: list[tuple[str, ...]] = []

    def watched(name: str) -> None:
        original = getattr(uses.Outer, name)
        monkeypatch.setattr(uses.Outer, name, lambda *given: (seen.append(precisions()), original(*given))[1])

    for name in ("materialised", "squared_norms", "lengths", "adding_weighted_sum"):
        watched(name)
    one_micro_batch(tmp_path, kept, autocast=False, monkeypatch=monkeypatch)
    assert set(seen) == {("ieee", "ieee")}
    assert precisions() == ("tf32", "bf16"), "put back"


def fail_in_full_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        assert precisions() == ("ieee", "ieee")
        assert not torch.is_autocast_enabled("cpu")
        raise ZeroDivisionError


@pytest.mark.usefixtures("fast_matmuls")
def test_what_was_set_is_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        fail_in_full_precision()
    assert precisions() == ("tf32", "bf16")
