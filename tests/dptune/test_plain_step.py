"""The step without privacy: ordinary gradients, divided like private ones. `tests/dptune/test_step_scale_and_retry.py`
compares both steps with loss scales, ranks and retries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptune import CausalLMLoss, InvalidArgument, PlainStep
from tests.dptune.test_step import EXAMPLES, adapted
from tests.dptune.test_step_scale_and_retry import adapted_fp16, fails_in_the_backward_pass, released
from tests.examples import padded
from tests.reference import example_gradients, flat


def test_the_gradient_is_the_mean_over_the_expected_batch_size():
    model = adapted()
    loss = CausalLMLoss(model)
    with PlainStep(model, 5.0) as step:
        for _ in range(2):  # the second step starts from zero
            for start in (0, 6):
                step.backward(loss(*padded(EXAMPLES[start : start + 6])))
            step.finish()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()
    expected = sum(flat(grads) for grads in example_gradients(adapted(), EXAMPLES)) / 5.0
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_step_without_examples_has_a_zero_gradient_and_leaving_it_none():
    model = nn.Linear(3, 1)
    with PlainStep(model, 5.0) as step:
        step.finish()
        assert not model.weight.grad.any()
        assert step.gradient_noise_std() == 0.0
    assert model.weight.grad is None


def test_nothing_is_clipped_so_there_are_no_norms_and_a_unit_of_rows_is_their_sum():
    model, rows = nn.Linear(3, 1, bias=False), torch.arange(12.0).view(4, 3)
    found = []
    for rows_per_unit in (1, 2):
        with PlainStep(model, 5.0) as step:
            stats = step.backward(model(rows)[:, 0], rows_per_unit=rows_per_unit, items=[0])
            step.finish()
            found.append(released(model))
        assert torch.equal(stats.losses, model(rows)[:, 0])
        assert (len(stats.norms), len(stats.clipped), stats.losses.requires_grad) == (0, 0, False)
    torch.testing.assert_close(found[0], rows.sum(0) / 5.0)
    assert torch.equal(*found)


def test_a_private_steps_state_is_refused():
    step = PlainStep(nn.Linear(3, 1), 5.0)
    step.load_state_dict(step.state_dict())
    with pytest.raises(InvalidArgument, match="this step has no privacy"):
        step.load_state_dict({"clip_norm": 1.0})


def test_a_small_gradient_of_an_fp16_base_is_scaled():
    weight = 2.0**-14
    found = []
    for dtype, scale in [(torch.float32, 1.0), (torch.float16, 4096.0), (torch.float16, 1.0)]:
        model = adapted_fp16(dtype)
        with PlainStep(model, 5.0, loss_scale=scale) as step:
            step.backward(CausalLMLoss(model)(*padded(EXAMPLES[:4])) * weight)
            step.finish()
            found.append(released(model))
    exact, scaled, unscaled = found
    assert (scaled - exact).norm() < 3e-3 * exact.norm()
    assert (unscaled - exact).norm() > 3e-2 * exact.norm()


def test_no_part_is_added_of_a_micro_batch_that_failed_between_layers(monkeypatch):
    """Gradients that autograd adds to `.grad` layer by layer would remain when a lower layer fails."""
    model = adapted()
    with PlainStep(model, 5.0) as step:
        fails_in_the_backward_pass(model, monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            step.backward(CausalLMLoss(model)(*padded(EXAMPLES)))
        step.finish()
        assert not released(model).any()
