"""A model that keeps what it saw in a buffer is refused before anything is released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument, Ledger, PrivateStep
from dptune.per_example import require_exact_gradients
from dptune.per_example.buffers import FixedBuffers, in_mode
from tests.private_sum import config_for

ROWS = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A linear layer and running statistics of each row's own features, [B, T, 4] -> [B]."""

    def __init__(self, *, track: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.norm = nn.InstanceNorm1d(4, track_running_stats=track)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.below(x).transpose(1, 2)).transpose(1, 2)).mean((1, 2))


REFUSAL = r"^norm\.running_mean=buffer of shape \(4,\): changes while the model trains"


def test_a_step_refuses_running_statistics_before_its_ledger_line(tmp_path: Path) -> None:
    model, ledger = Net(), Ledger(tmp_path / "ledger.jsonl")
    with PrivateStep(model, config_for(8, clip_norm=1.0), ledger=ledger) as step:
        step.backward(model(ROWS))
        with pytest.raises(InvalidArgument, match=REFUSAL) as error:
            step.finish()
        assert ledger.steps == 0
        assert all(parameter.grad is None for parameter in model.parameters())
    assert "\n" not in str(error.value)


def test_a_step_takes_statistics_that_stand_still(tmp_path: Path) -> None:
    for number, model in enumerate((Net(track=False), Net().eval())):
        ledger = Ledger(tmp_path / f"{number}.jsonl")
        with PrivateStep(model, config_for(8, clip_norm=1.0), ledger=ledger) as step:
            step.backward(model(ROWS))
            step.finish()
        assert ledger.steps == 1


def test_the_check_tries_a_forward_pass_in_training_mode() -> None:
    model = Net().eval()
    with pytest.raises(InvalidArgument, match=REFUSAL):
        require_exact_gradients(model, model, ROWS)
    assert not model.training
    require_exact_gradients(model := Net(track=False), model, ROWS)


def holder() -> nn.Module:
    model = nn.Module()
    model.register_buffer("small", torch.ones(3))
    model.register_buffer("large", torch.ones(1 << 21))
    return model


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "written to": lambda model: model.small.add_(1),
    "replaced": lambda model: setattr(model, "small", torch.zeros(3)),
    "of another shape": lambda model: setattr(model, "small", torch.ones(4)),
    "not there before": lambda model: model.register_buffer("new", torch.ones(1), persistent=False),
    "large and written to": lambda model: model.large.add_(1),
    "large and replaced": lambda model: setattr(model, "large", torch.zeros(1 << 21)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found(change: str) -> None:
    model = holder()
    fixed = FixedBuffers(model)
    fixed.require_unchanged()
    CHANGES[change](model)
    with pytest.raises(InvalidArgument, match="changes while the model trains"):
        fixed.require_unchanged()


def test_equal_values_are_no_change() -> None:
    """Rotary frequencies are written anew in every forward pass of some models."""
    model = holder()
    fixed = FixedBuffers(model)
    model.small.copy_(torch.ones(3))
    model.large = torch.ones(1 << 21)
    fixed.require_unchanged()
    model.small = torch.ones(3)
    fixed.require_unchanged()
    model.small = torch.zeros(3)
    with pytest.raises(InvalidArgument, match="changes while the model trains"):
        fixed.require_unchanged()


def test_buffers_of_the_inference_mode_are_compared_by_value() -> None:
    with torch.inference_mode():
        model = holder()
    fixed = FixedBuffers(model)
    fixed.require_unchanged()
    with torch.inference_mode():
        model.small.add_(1)
    with pytest.raises(InvalidArgument):
        fixed.require_unchanged()


def test_every_module_gets_its_own_mode_back() -> None:
    model = Net().train()
    model.norm.eval()
    with in_mode(model, training=False):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.norm.training
