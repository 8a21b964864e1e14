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


def test_a_gradient_of_zero_is_reached() -> None:
    """A LoRA adapter's A has none at the start."""
    model = TwoTowers()
    model.vision.requires_grad_(False)
    nn.init.zeros_(model.text["second"].weight)
    require_exact_gradients(model, model, IDS)


def test_what_is_reached_everywhere_has_no_common_place() -> None:
    with pytest.raises(InvalidArgument, match=r"^b\.w: the losses do not reach it, so .* that are reached$"):
        require_reached(["a.w", "b.w", "c.w"], {"a.w": 1, "c.w": 1})
    require_reached(["a.w"], {"a.w": 1})


class InPlace(TwoTowers):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.text["first"](self.words(ids))
        hidden *= 2
        return hidden.square().flatten(1).mean(1)


def test_a_model_that_changes_an_output_in_place_is_refused_in_one_line() -> None:
    model = InPlace()
    model.vision.requires_grad_(False)
    model.text["second"].requires_grad_(False)
    with pytest.raises(
        InvalidArgument, match=r"^model=InPlace: does not run while .* \(RuntimeError: .*modified inplace"
    ):
        require_exact_gradients(model, model, IDS)
    assert model.text["first"].weight.requires_grad, "the recorder let it go"


class Shared(TwoTowers):
    """The second layer is also given a table that all examples share."""

    def forward(self, ids: Tensor) -> Tensor:
        table = self.text["second"](torch.ones(1, 6, 4)).mean()
        return (self.text["second"](self.words(ids)) + table).square().flatten(1).mean(1)


def test_a_layer_that_is_fed_a_table_without_examples_is_refused_in_one_line() -> None:
    model = Shared()
    model.vision.requires_grad_(False)
    model.text["first"].requires_grad_(False)
    with pytest.raises(
        InvalidArgument, match=r"^text\.second: its input has \d rows, that of text\.second has \d: each row"
    ):
        require_exact_gradients(model, model, IDS)


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
