"""The check before training refuses a model that the rules do not describe, and passes one that they describe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptune import CausalLMLoss, InvalidArgument
from dptune.per_example import require_exact_gradients
from tests.whole_models import CAUSAL, whole_model


class _ElsewhereToo(nn.Module):
    """An output layer that no rule sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(20, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.middle(self.embedding(ids)), self.embedding.weight)


class _TimeFirst(nn.Module):
    """Puts tokens where examples belong."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(20, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.middle(self.embedding(ids).tanh().transpose(0, 1)).transpose(0, 1)


def squares(model: nn.Module):
    return lambda ids: model(ids).square().flatten(1).mean(1)


def test_a_model_that_rules_do_not_describe_is_found_out_before_training():
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (3, 3))
    with pytest.raises(InvalidArgument, match=r"embedding\.weight: its per-example gradients differ from autograd's"):
        require_exact_gradients(model := _ElsewhereToo(), squares(model), ids)
    with pytest.raises(InvalidArgument, match=r"middle\.weight: its per-example gradients differ from autograd's"):
        require_exact_gradients(model := _TimeFirst(), squares(model), ids)
    with pytest.raises(InvalidArgument, match=r"^embedding: its input has 3 rows, that of middle has 5: each row"):
        require_exact_gradients(model := _TimeFirst(), squares(model), torch.randint(0, 20, (3, 5)))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_check_passes_on_models_that_train_and_leaves_them_as_they_were(name):
    model = whole_model(name).float().train()
    ids = torch.randint(3, 400, (3, 7), generator=torch.Generator().manual_seed(0))
    require_exact_gradients(model, CausalLMLoss(model), ids, ids)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_losses_that_couple_examples_are_found_out():
    model = whole_model("GPT-2").float()
    ids = torch.randint(3, 400, (3, 7), generator=torch.Generator().manual_seed(0))
    own = CausalLMLoss(model)
    with pytest.raises(InvalidArgument, match=r"losses.shape=\(\).* couples"):
        require_exact_gradients(model, lambda ids: own(ids, ids).mean(), ids)
    with pytest.raises(InvalidArgument, match="couple examples"):
        require_exact_gradients(model, lambda ids: own(ids, ids) / len(ids), ids)
    with pytest.raises(InvalidArgument, match="do not depend on any trained parameter"):
        require_exact_gradients(model, lambda ids: torch.zeros(len(ids), requires_grad=True), ids)
