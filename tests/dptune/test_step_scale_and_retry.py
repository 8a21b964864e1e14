"""The step with loss scales, with an all-reduce, and with micro-batches that fail half-way and are tried again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from dptune import (
    CausalLMLoss,
    InvalidArgument,
    Ledger,
    PlainStep,
    PrivateStep,
)
from dptune.clipping import whole_norms
from dptune.clipping_styles import Adaptive
from dptune.per_example import HalfAdded, uses
from tests.dptune.test_step import EXAMPLES, adapted, size_of
from tests.examples import padded
from tests.private_sum import NoNoise, config_for, sum_so_far
from tests.processes import run_processes
from tests.whole_models import whole_model


def adapted_fp16(dtype: torch.dtype) -> nn.Module:
    """`adapted`, its base rounded to fp16 and held in `dtype`; the adapters stay float32."""
    model = adapted()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half().to(dtype)
    return model


def per_example(model: nn.Module, examples, *, loss_scale: float, weight: float = 1.0) -> torch.Tensor:
    """Contribution of each example to a noiseless step without clipping, [B, P]; losses are multiplied by `weight`."""
    rows = []
    for example in examples:
        with a_step(model, clip_norm=1e6, loss_scale=loss_scale) as step:
            step.backward(CausalLMLoss(model)(*padded([example])) * weight)
            step.finish()
        rows.append(released(model) * step.config.divisor / weight)
    return torch.stack(rows)


class NoLedger:
    """A stand-in for `Ledger` where no test reads it."""

    group_size = 1

    def record(self, **_entry) -> None:
        """Write nothing."""


def a_step(model: nn.Module, *, clip_norm: float = 0.05, **how) -> PrivateStep:
    """A noiseless step."""
    config = config_for(12, clip_norm=clip_norm)
    return PrivateStep(model, config, ledger=NoLedger(), noise=NoNoise(size_of(model)), **how)


def released(model: nn.Module) -> torch.Tensor:
    """Flat gradients. Inside a private step no parameter has `requires_grad`, but trained ones have a gradient."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_step(model: nn.Module, step: PrivateStep | PlainStep, pieces=((0, 6), (6, 12))) -> torch.Tensor:
    """The release of a step over the examples, flat."""
    with step:
        for start, stop in pieces:
            step.backward(CausalLMLoss(model)(*padded(EXAMPLES[start:stop])))
        step.finish()
        return released(model)


def test_an_error_after_the_gradients_were_added_spoils_the_step(monkeypatch):
    """A second try would add the micro-batch twice, and count it once more."""
    model = adapted()
    step = PrivateStep(
        model,
        replace(config_for(12, clip_norm=0.05), clipping=Adaptive(count_noise=5.0)),
        ledger=NoLedger(),
        noise=NoNoise(size_of(model) + 1),
    )

    class Exhausted:
        """A count that cannot be added."""

        def __radd__(self, _sum):
            raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(PrivateStep, "_count", lambda *_: Exhausted())
    with step:
        with pytest.raises((RuntimeError, TypeError)):
            step.backward(CausalLMLoss(model)(*padded(EXAMPLES[:6])))
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="half done"):
            step.backward(CausalLMLoss(model)(*padded(EXAMPLES[:6])))


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0, 1000.0, float("inf"), float("nan")])
def test_a_loss_scale_is_a_power_of_two(scale):
    with pytest.raises(InvalidArgument, match=r"loss_scale=.*power of two"):
        a_step(adapted(), loss_scale=scale)


@pytest.mark.parametrize("scale", [2.0**-10, 0.5, 2.0, 4096.0, 2.0**20])
def test_in_float32_no_loss_scale_changes_a_bit(scale):
    found = {}
    for given in (1.0, scale):
        model = adapted()
        with a_step(model, loss_scale=given) as step:
            stats = step.backward(CausalLMLoss(model)(*padded(EXAMPLES)))
            step.finish()
        found[given] = (stats.losses, stats.norms, released(model))
        found[-given] = (one_step(model, PlainStep(model, 5.0, loss_scale=given)),)
    assert all(torch.equal(*pair) for pair in zip(found[1.0], found[scale], strict=True))
    assert torch.equal(found[-1.0][0], found[-scale][0])
    assert (found[1.0][1] > 0.05).any()  # some are clipped


@pytest.mark.parametrize("weight", [1.0, 2.0**-14])
def test_a_scaled_fp16_gradient_is_that_of_float32_however_small(weight):
    """With 2^-14 of their loss, gradients are as small as for a loss over many thousand tokens; fp16 loses them."""
    exact = per_example(adapted_fp16(torch.float32), EXAMPLES[:4], loss_scale=1.0, weight=weight)
    scaled = per_example(adapted_fp16(torch.float16), EXAMPLES[:4], loss_scale=4096.0, weight=weight)
    unscaled = per_example(adapted_fp16(torch.float16), EXAMPLES[:4], loss_scale=1.0, weight=weight)
    assert ((scaled - exact).norm(dim=1) < 3e-3 * exact.norm(dim=1)).all()
    if weight < 1:
        assert ((unscaled - exact).norm(dim=1) > 3e-2 * exact.norm(dim=1)).all()


def test_an_example_that_overflows_fp16_contributes_nothing_and_touches_no_other():
    model = adapted_fp16(torch.float16)
    weights = torch.ones(4)
    weights[1] = 2.0**10  # times the scale: above fp16's maximum, 65504
    with a_step(model, loss_scale=4096.0) as step:
        stats = step.backward(CausalLMLoss(model)(*padded(EXAMPLES[:4])) * weights)
        step.finish()
    with_it = released(model)
    assert not stats.norms[1].isfinite()
    assert stats.norms[[0, 2, 3]].isfinite().all()
    assert with_it.isfinite().all()
    with a_step(model, loss_scale=4096.0) as step:
        others = step.backward(CausalLMLoss(model)(*padded([EXAMPLES[i] for i in (0, 2, 3)])))
        step.finish()
    torch.testing.assert_close(stats.norms[[0, 2, 3]], others.norms, rtol=2e-3, atol=0)
    assert (with_it - released(model)).norm() < 2e-3 * released(model).norm()


def _reduce(share):
    """What `accelerator.reduce` does."""
    torch.distributed.all_reduce(share)
    return share


def _summed(rank, gather, folder):
    """[how][private, plain]: steps on two ranks that add up with a gather or an all-reduce."""
    model, halves, found = adapted(), ((6 * rank, 6 * rank + 6),), {}
    config, noise = config_for(12, clip_norm=0.05), NoNoise(size_of(model))
    for how, meet in {"gather": gather, "reduce": _reduce}.items():
        ranks = {how: meet, "world_size": 2}
        private = PrivateStep(model, config, ledger=Ledger(folder / "ledger.jsonl"), noise=noise, rank=rank, **ranks)
        found[how] = one_step(model, private, halves), one_step(model, PlainStep(model, 5.0, **ranks), halves)
    return found


def test_an_all_reduce_gives_the_sum_of_a_gather(tmp_path):
    one, other = run_processes(2, _summed, tmp_path)
    for kind in (0, 1):  # private, plain
        assert torch.equal(one["gather"][kind], other["gather"][kind])
        for rank in (one, other):
            difference = (rank["reduce"][kind] - one["gather"][kind]).norm()
            assert difference < 1e-6 * one["gather"][kind].norm()


class _FailsOnce(torch.autograd.Function):
    """Identity whose backward pass fails the first time, after the layers above have been recorded."""

    @staticmethod
    def forward(ctx, x, failures):
        ctx.failures = failures
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if ctx.failures:
            raise torch.OutOfMemoryError(ctx.failures.pop())
        return grad, None


def fails_in_the_backward_pass(model, _monkeypatch):
    failures = ["CUDA out of memory. Tried to allocate"]
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: _FailsOnce.apply(out, failures))
    return failures


def fails_after(calls):
    """Run out of memory while making the sums, after the products of so many parameters."""

    def arm(_model, monkeypatch):
        failures, seen = ["CUDA out of memory. Tried to allocate"], []
        product = torch.Tensor.__matmul__

        def matmul(one, other):
            seen.append(1)
            if failures and one.ndim == 1 and len(seen) > calls:
                raise torch.OutOfMemoryError(failures.pop())
            return product(one, other)

        monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
        return failures

    return arm


def fails_while_norms_are_taken(_model, monkeypatch):
    failures = ["CUDA out of memory. Tried to allocate"]

    def norms(squared):
        if failures:
            raise torch.OutOfMemoryError(failures.pop())
        return whole_norms(squared)

    monkeypatch.setattr("dptune.step.whole_norms", norms)
    return failures


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "arm"),
    [
        ("private", fails_in_the_backward_pass),
        ("private", fails_after(0)),
        ("private", fails_after(5)),
        ("private", fails_while_norms_are_taken),
        ("plain", fails_in_the_backward_pass),
    ],
)
def test_a_micro_batch_that_failed_counts_once_when_it_is_tried_again_in_pieces(kind, arm, checkpointing, monkeypatch):
    def step_of(model):
        return a_step(model) if kind == "private" else PlainStep(model, 5.0)

    def fresh():
        model = adapted()
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    pieces = ((0, 4), (4, 8), (8, 12))
    model = fresh()
    expected = one_step(model, step_of(model), pieces)
    model = fresh()
    losses = CausalLMLoss(model)
    with step_of(model) as step:
        step.backward(losses(*padded(EXAMPLES[:4])))
        failures = arm(model, monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            step.backward(losses(*padded(EXAMPLES[4:])))
        assert not failures
        for start, stop in pieces[1:]:
            step.backward(losses(*padded(EXAMPLES[start:stop])))
        step.finish()
        assert torch.equal(released(model), expected)


@pytest.mark.parametrize("at_once", ["all", "one"])
@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_whole_models_sum_that_breaks_off_is_tried_again_or_never_used(done, at_once, monkeypatch):
    """Its products go straight into the sum: nothing was added before the first, and after it the step is lost. A
    layer's may be several, one after another."""
    model, calls = whole_model("GPT-2"), []
    losses, add = CausalLMLoss(model), uses.Outer.adding_weighted_sum
    monkeypatch.setattr(uses, "_WORTH", 0)  # every matrix as factors
    if at_once == "one":
        monkeypatch.setattr(uses.Outer, "_examples_at_once", lambda _: 1)
    with a_step(model) as step:
        step.backward(losses(*padded(EXAMPLES[:4])))
        kept = sum_so_far(step).clone()

        def failing(use, total, weights):
            products = add(use, total, weights)
            for _ in use._starts():
                calls.append(1)
                if len(calls) == done + 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
                yield next(products)

        monkeypatch.setattr(uses.Outer, "adding_weighted_sum", failing)
        with pytest.raises(HalfAdded if done else torch.OutOfMemoryError) as raised:
            step.backward(losses(*padded(EXAMPLES[4:])))
        assert not (done and should_reduce_batch_size(raised.value))  # not an error that allows a retry
        if done:
            for use in (step.finish, lambda: step.backward(losses(*padded(EXAMPLES[4:])))):
                with pytest.raises(RuntimeError, match="half done"):
                    use()
        else:
            assert torch.equal(sum_so_far(step), kept)
            step.backward(losses(*padded(EXAMPLES[4:])))
            assert not torch.equal(sum_so_far(step), kept)
