"""The check before training refuses a model that the rules do not describe, and passes one that they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptune import CausalLMLoss, InvalidArgument
from dptune.per_example import RandomRow, require_exact_gradients, require_precision, require_separate_rows
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


class _Centre(nn.Module):
    """Normalises by the mean of its micro-batch in training, as hand-written batch normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(features - features.mean(0)) if self.training else self.out(features)


def separate_rows(model: nn.Module) -> None:
    def batch_of(rows: Sequence[RandomRow]) -> list[Tensor]:
        return [torch.stack([torch.randn(6, generator=row.generator()) for row in rows])]

    require_separate_rows(model, squares(model), batch_of, longest=1)


def test_rows_that_reach_each_other_in_training_mode_only_are_found_out():
    separate_rows(nn.Linear(6, 2))
    separate_rows(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
    with pytest.raises(InvalidArgument, match=r"^model=_Centre: a row's loss in training mode is .* normalises each"):
        separate_rows(_Centre())


class _Told(nn.Module):
    """Adds to its losses, in one mode, what the number of the row's neighbour says."""

    def __init__(self, added: Mapping[int, float], *, training: bool = True) -> None:
        super().__init__()
        self.out, self.added, self.mode = nn.Linear(6, 2), added, training

    def forward(self, features: Tensor) -> Tensor:
        told = self.added.get(int(features[-1, 0]), 0.0) if self.training is self.mode else 0.0
        return squares(self.out)(features) + told


def told_rows(model: nn.Module) -> None:
    """Each row begins with its number; the neighbours have the numbers from 1 on."""

    def batch_of(rows: Sequence[RandomRow]) -> list[Tensor]:
        return [torch.stack([torch.tensor([float(row.number), *row.normal((5,))]) for row in rows])]

    torch.manual_seed(0)
    require_separate_rows(model, model, batch_of, longest=1)


@pytest.mark.parametrize(
    ("added", "training"),
    [
        ({1: 0.5}, False),
        ({1: 1e-5, 5: 1.0}, False),
        ({5: 1.0}, False),
        ({2: 1.0}, True),
        ({5: 1.0}, True),
        ({2: 1e-5, 5: 1.0}, True),
    ],
)
def test_a_row_that_only_some_neighbours_reach_is_found_in_either_mode(added, training):
    with pytest.raises(InvalidArgument, match="depending on its padding and on other rows"):
        told_rows(_Told(added, training=training))


def test_layers_skipped_at_random_for_all_rows_at_once_are_refused():
    model = nn.Sequential(nn.Linear(6, 2))
    model[0].layerdrop = 0.0
    separate_rows(model)
    model[0].layerdrop = 0.1
    with pytest.raises(InvalidArgument, match=r"^0\.layerdrop=0\.1: .*set it to 0"):
        separate_rows(model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_that_are_recomputed_in_training_are_recomputed_in_the_check(dropout: float) -> None:
    """Otherwise the check would not fit where training does. A layer that drops values itself would drop them here."""
    torch.manual_seed(0)
    model = whole_model("OPT").float().train()
    passes = {}
    for recomputes in (False, True):
        layers = model.model.decoder.layers
        for layer in layers:
            layer.dropout = dropout
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        in_backward: list[bool] = []

        def note(*_: object, calls: list[bool] = in_backward) -> None:
            calls.append(torch._C._current_graph_task_id() != -1)

        hook = layers[0].fc1.register_forward_hook(note)
        ids = torch.randint(3, 400, (3, 7), generator=torch.Generator().manual_seed(0))
        require_exact_gradients(model, CausalLMLoss(model), ids, ids)
        hook.remove()
        passes[recomputes] = sum(in_backward)
    assert passes[False] == 0
    assert (passes[True] > 0) == (dropout == 0)
    assert all(module.training for module in model.modules())


class _Steep(nn.Module):
    """Outputs whose gradients at the middle layer are 2^`power` times those at the last one."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.embedding, self.middle, self.factor = nn.Embedding(20, 4), nn.Linear(4, 4), 2.0**power

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.middle(self.embedding(ids)).float() * self.factor
        return hidden


def refusal_in_float16(power: int, scale: float) -> str | None:
    """What the check says of a model with such gradients; None if it passes."""
    torch.manual_seed(0)
    model = _Steep(power)

    def losses(ids: Tensor) -> Tensor:
        return model(ids).flatten(1).mean(1)

    def lower(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return losses(ids)

    def batch_of(rows: Sequence[RandomRow]) -> list[Tensor]:
        return [torch.stack([RandomRow(6, row.number).tokens(20) for row in rows])]

    try:
        require_precision(model, losses, lower, batch_of, longest=6, scale=scale)
    except InvalidArgument as error:
        return str(error)
    return None


@pytest.mark.parametrize(("power", "scale"), [(0, 256.0), (14, 1.0), (-27, 2.0**20)])
def test_gradients_that_float16_holds_pass(power: int, scale: float) -> None:
    assert refusal_in_float16(power, scale) is None


@pytest.mark.parametrize(("power", "scale"), [(14, 256.0), (-27, 1.0)])
def test_gradients_that_overflow_or_vanish_in_float16_are_found_out_before_training(power: int, scale: float) -> None:
    told = refusal_in_float16(power, scale)
    assert told is not None
    assert "its gradients overflow or vanish in lower precision" in told
