"""A model that keeps what it saw in a buffer or a weight is refused before anything is released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument, Ledger, PrivateStep
from dptune.per_example import require_exact_gradients
from dptune.per_example.fixed_values import SMALL, FixedValues, every, in_mode
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
    model.register_buffer("large", torch.ones(1 << 21).index_fill_(0, torch.tensor(3), 1.5))
    return model


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "written to": lambda model: model.small.add_(1),
    "written to behind autograd's back": lambda model: model.small.data.add_(1),
    "replaced": lambda model: setattr(model, "small", torch.zeros(3)),
    "of another shape": lambda model: setattr(model, "small", torch.ones(4)),
    "not there before": lambda model: model.register_buffer("new", torch.ones(1), persistent=False),
    "large and written to": lambda model: model.large.add_(1),
    "large and a little of it written to": lambda model: model.large.data[-1].add_(1e-7),
    "large and a value moved to another row": lambda model: model.large.data.copy_(model.large.roll(1 << 12)),
    "large and a value moved in its row": lambda model: model.large.data.copy_(model.large.roll(200)),
    "large and replaced": lambda model: setattr(model, "large", torch.zeros(1 << 21)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found(change: str) -> None:
    model = holder()
    fixed = FixedValues(model)
    fixed.require_unchanged()
    CHANGES[change](model)
    with pytest.raises(InvalidArgument, match="changes while the model trains"):
        fixed.require_unchanged()


def test_equal_values_are_no_change() -> None:
    """Rotary frequencies are written anew in every forward pass of some models."""
    model = holder()
    fixed = FixedValues(model)
    model.small.copy_(torch.ones(3))
    model.large = model.large.clone()
    fixed.require_unchanged()
    model.small = torch.ones(3)
    fixed.require_unchanged()
    model.small = torch.zeros(3)
    with pytest.raises(InvalidArgument, match="changes while the model trains"):
        fixed.require_unchanged()


def test_buffers_of_the_inference_mode_are_compared_by_value() -> None:
    with torch.inference_mode():
        model = holder()
    fixed = FixedValues(model)
    fixed.require_unchanged()
    with torch.inference_mode():
        model.small.add_(1)
    with pytest.raises(InvalidArgument):
        fixed.require_unchanged()


class Keeps(nn.Module):
    """A linear layer, and a mean of what it saw, as codebooks and momentum encoders keep it; [B, 4] -> [B]."""

    def __init__(self, kind: str, size: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.head = kind, nn.Linear(4, 1)
        if "buffer" in kind:
            self.register_buffer("mean", torch.zeros(size))
        else:
            self.mean = nn.Parameter(torch.zeros(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.head.weight[0] if self.kind == "trained" else self.mean[:4]
        if self.training or self.kind == "frozen, evaluated":
            kept.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.head(x)[:, 0]


@pytest.mark.parametrize("kind", ["buffer", "frozen", "frozen, evaluated", "trained"])
@pytest.mark.parametrize("size", [4, 2 * SMALL + 3])
def test_the_check_finds_what_a_forward_pass_writes(kind: str, size: int) -> None:
    model = Keeps(kind, size)
    name, where = ("head.weight", "parameter") if kind == "trained" else ("mean", kind.split(",")[0])
    where = "buffer" if where == "buffer" else "parameter"
    with pytest.raises(InvalidArgument, match=rf"^{name}={where} of shape \(\d+,.*\): changes while the model trains"):
        require_exact_gradients(model, lambda x: model(x).square(), ROWS[:3, 0])


@pytest.mark.parametrize("kind", ["buffer", "frozen"])
def test_a_step_finds_what_a_forward_pass_writes(kind: str, tmp_path: Path) -> None:
    """After the first step too, and without any check before."""
    model, ledger = Keeps(kind).eval(), Ledger(tmp_path / "ledger.jsonl")
    with PrivateStep(model, config_for(8, clip_norm=1.0), ledger=ledger) as step:
        step.backward(model(ROWS[:, 0]))
        step.finish()
        model.train()
        step.backward(model(ROWS[:, 0]))
        with pytest.raises(InvalidArgument, match=r"^mean=.*changes while the model trains"):
            step.finish()
    assert ledger.steps == 1


def test_a_step_holds_no_copy_of_a_large_frozen_weight_and_lets_the_optimizer_write(tmp_path: Path) -> None:
    model = Keeps("frozen", 2 * SMALL).eval()
    with PrivateStep(model, config_for(8, clip_norm=1.0), ledger=Ledger(tmp_path / "ledger.jsonl")) as step:
        assert step._fixed._kept.keys() == set()
        for _ in range(2):
            step.backward(model(ROWS[:, 0]))
            step.finish()
            torch.optim.SGD(model.head.parameters(), lr=1.0).step()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("size", [(), (3,), (SMALL + 5,), (3, SMALL + 5)])
def test_any_dtype_and_size_is_compared_and_little_is_kept(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    model = nn.Module()
    model.register_buffer("own", torch.ones((2, *size)).to(dtype)[1])
    fixed = FixedValues(model)
    fixed.require_unchanged()
    kept = fixed._kept["own"]
    assert kept.nbytes <= max(4096, 16 * 8 * model.own.nbytes**0.5)
    model.own.view(-1)[-1] = 0
    with pytest.raises(InvalidArgument, match=r"^own="):
        fixed.require_unchanged()


def test_values_that_are_no_number_are_equal_to_themselves() -> None:
    model = holder()
    model.small.fill_(torch.nan)
    fixed = FixedValues(model, every)
    fixed.require_unchanged()
    model.small[0] = 1.0
    with pytest.raises(InvalidArgument, match="changes while the model trains"):
        fixed.require_unchanged()


def test_every_module_gets_its_own_mode_back() -> None:
    model = Net().train()
    model.norm.eval()
    with in_mode(model, training=False):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.norm.training
