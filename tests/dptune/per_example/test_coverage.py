"""Trained parameters that the losses never reach, and models that cannot be recorded: one line, before training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument
from dptune.per_example import require_exact_gradients
from dptune.per_example.coverage import in_one_line, require_reached

IDS = torch.arange(15).view(3, 5) % 7


class TwoTowers(nn.Module):
    """Text goes through one of two towers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4).requires_grad_(False)
        self.text = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        self.vision = nn.ModuleDict({"first": nn.Linear(4, 4)})

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.text["second"](self.text["first"](self.words(ids)).tanh())
        return hidden.square().flatten(1).mean(1)


def under_text(kind: type[TwoTowers], frozen: str | None = None) -> TwoTowers:
    """A model whose tower for text is trained, except for its layer `frozen`."""
    model = kind()
    model.vision.requires_grad_(False)
    if frozen is not None:
        model.text[frozen].requires_grad_(False)
    return model


def test_a_tower_that_the_losses_do_not_reach_is_found_before_training() -> None:
    model = TwoTowers()
    told = (
        r"^vision\.first\.weight: the losses do not reach it and 1 other trained parameters, so only noise would train "
        r"there; freeze them, or choose layers that are reached, such as text\.\*$"
    )
    with pytest.raises(InvalidArgument, match=told):
        require_exact_gradients(model, model, IDS)
    model.vision.requires_grad_(False)
    require_exact_gradients(model, model, IDS)


class Skips(TwoTowers):
    """The first layer is never used."""

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.text["second"](self.words(ids))
        return hidden.square().flatten(1).mean(1)


def test_a_gradient_of_zero_is_reached_and_none_at_all_is_not() -> None:
    """A LoRA adapter's A has a gradient of zero at the start."""
    model = under_text(TwoTowers)
    nn.init.zeros_(model.text["second"].weight)
    (grad,) = torch.autograd.grad(model(IDS).sum(), model.text["first"].weight)
    assert not grad.any()
    require_exact_gradients(model, model, IDS)
    with pytest.raises(InvalidArgument, match=r"^text\.first\.weight: the losses do not reach it and 1 other"):
        require_exact_gradients(skipping := under_text(Skips), skipping, IDS)


def test_what_is_reached_everywhere_has_no_common_place() -> None:
    with pytest.raises(InvalidArgument, match=r"^b\.w: the losses do not reach it, so .* that are reached$"):
        require_reached(["a.w", "b.w", "c.w"], {"a.w": 1, "c.w": 1})
    require_reached(["a.w"], {"a.w": 1})


class InPlace(TwoTowers):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.text["first"](self.words(ids))
        hidden *= 2
        return hidden.square().flatten(1).mean(1)


class Shared(TwoTowers):
    """The second layer is also given a table that all examples share."""

    def forward(self, ids: Tensor) -> Tensor:
        table = self.text["second"](torch.ones(1, 6, 4)).mean()
        return (self.text["second"](self.words(ids)) + table).square().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("kind", "trained", "frozen", "told"),
    [
        (InPlace, "first", "second", r"^model=InPlace: does not run while .* \(RuntimeError: .*modified inplace"),
        (Shared, "second", "first", r"^text\.second: its input has \d rows, that of text\.second has \d: each row"),
    ],
)
def test_a_model_that_cannot_be_recorded_is_refused_in_one_line(
    kind: type[TwoTowers], trained: str, frozen: str, told: str
) -> None:
    model = under_text(kind, frozen)
    with pytest.raises(InvalidArgument, match=told):
        require_exact_gradients(model, model, IDS)
    assert model.text[trained].weight.requires_grad, "the recorder let it go"


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full"), InvalidArgument("a", 1, "b")])
def test_memory_and_refusals_stay_what_they_are(error: Exception) -> None:
    def fail(_model: nn.Module) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        in_one_line(fail)(nn.Linear(1, 1))
    assert caught.value is error


def test_a_long_reason_is_cut() -> None:
    def fail(_model: nn.Module) -> None:
        raise ValueError("a\nlong reason " * 99)

    with pytest.raises(InvalidArgument, match="ValueError: a long reason a long") as caught:
        in_one_line(fail)(nn.Linear(1, 1))
    assert len(str(caught.value)) < 330
    assert isinstance(caught.value.__cause__, ValueError)
