"""The check before a run, on sharded trained weights: every rank accepts the model, or every rank refuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, InvalidArgument
from dptune.per_example import rules
from dptune.sharding import local_part, shard
from tests.processes import run_processes
from tests.whole_models import whole_model
from utils.models.sharded import decoder_layers
from utils.models.trainable import check_rules

Gather = Callable[[Tensor], Tensor]


def half_a_gradient(layer: nn.Linear, input: Tensor, grad: Tensor) -> Any:
    """A wrong rule for one layer of one rank's rows: half of the true gradient."""
    return rules.linear(layer, input, grad / 2)


class Coupled:
    """Losses that depend on all rows of the micro-batch."""

    def __init__(self, losses: Any) -> None:
        self._losses = losses

    def __call__(self, *batch: Tensor) -> Tensor:
        losses: Tensor = self._losses(*batch)
        return losses + losses.mean()


def _checked(rank: int, _gather: Gather, fault: str) -> dict[str, str]:
    """{model: why it was refused}; empty reasons mean that it was accepted."""
    found = {}
    for name in ("GPT-2", "Llama, tied", "Llama"):
        model = whole_model(name).float()
        shard(model.requires_grad_(False), decoder_layers(model), device=torch.device("cpu"))
        model.requires_grad_(True)
        before = {key: local_part(value).clone() for key, value in model.state_dict().items()}
        losses: Any = CausalLMLoss(model)
        if fault == "wrong rule" and rank == 1:
            rules._RULES[nn.Linear] = half_a_gradient
        if fault == "coupled rows":
            losses = Coupled(losses)
        found[name] = ""
        try:
            check_rules(model, losses, torch.device("cpu"), width=12)
        except InvalidArgument as error:
            found[name] = str(error)
        after = {key: local_part(value) for key, value in model.state_dict().items()}
        if any(not torch.equal(before[key], after[key]) for key in before):
            found[name] = "the check changed a weight"
        if any(parameter.grad is not None for parameter in model.parameters()):
            found[name] = "the check left a gradient"
    return found


def test_models_whose_gradients_are_right_pass() -> None:
    for found in run_processes(2, _checked, "none"):
        assert found == {"GPT-2": "", "Llama, tied": "", "Llama": ""}


@pytest.mark.parametrize(
    ("fault", "reason"), [("wrong rule", "differ from autograd's"), ("coupled rows", "depending on its padding")]
)
def test_a_fault_is_refused_by_every_rank_with_the_same_words(fault: str, reason: str) -> None:
    first, second = run_processes(2, _checked, fault)
    assert first == second
    for name in ("Llama, tied", "Llama"):
        assert "differ from autograd's" in first[name] or reason in first[name]
