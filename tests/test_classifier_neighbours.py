"""The neighbour test for classifiers, in each mode: removing any one row changes the noiseless sum by at
most C. Pooling as transformers does it for embeddings, at the last position, even of padding, must fail this test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dptune.integrations.peft import class_logits, prompted
from dptune.per_example import PerExampleGradients
from tests.classifiers import PAD, classifier, rows, shake
from tests.private_sum import config_for
from tests.reference import Example
from tests.test_neighbours import ROUNDING, moved
from utils.classification.mode_defaults import MODES
from utils.classification.modes import prepare_mode


def losses(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The first label of a row is its class."""
    logits = class_logits(model, {"input_ids": ids, "attention_mask": ids.ne(PAD).long()})
    return F.cross_entropy(logits, labels[:, 0], reduction="none")


def pooled_at_the_end(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Broken on purpose: the model's own pooling, which classifies by padding."""
    inputs = {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}
    base = model.get_base_model()
    logits = base(**prompted(model, base, inputs)).logits
    return F.cross_entropy(logits, labels[:, 0], reduction="none")


def trained(name: str, mode: str, seed: int) -> Any:
    """A classifier as `train_classifier.py` prepares it, in float64, with parameters away from their start."""
    model, _ = prepare_mode(classifier(name, seed=seed), mode, lora_r=2, num_prepend_tokens=3)
    model.double().eval()
    shake(model)
    return model


def examples(count: int, seed: int) -> list[Example]:
    ids, labels = rows(count, seed=seed)
    return [(row, [label] * len(row)) for row, label in zip(ids, labels, strict=True)]


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in ("BERT", "Llama") for mode in MODES if (name, mode) != ("Llama", "bias-only")],
)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 6),
    clip_norm=st.floats(1e-2, 30.0),
    token_budget=st.integers(1, 60),
    without=st.integers(0, 5),
)
def test_one_row_moves_the_sum_by_at_most_the_sensitivity(
    name: str, mode: str, seed: int, count: int, clip_norm: float, token_budget: int, without: int
) -> None:
    model, config = trained(name, mode, seed), config_for(count, clip_norm=clip_norm)
    how: dict[str, Any] = {"losses": losses, "token_budget": token_budget}
    assert moved(model, examples(count, seed), config, without % count, **how) <= 1 + ROUNDING


def test_a_class_that_depends_on_padding_is_caught() -> None:
    """With two short rows and a long one, removing the long row would change the others' gradients."""
    model, config = trained("Llama", "soft-prompt", 0), config_for(3, clip_norm=1e-2)
    ragged = [([5, 6], [0, 0]), ([7, 8, 9], [1, 1, 1]), (list(range(3, 25)), [2] * 22)]
    how: dict[str, Any] = {"token_budget": 1000, "cut": one_micro_batch}
    assert moved(model, ragged, config, 2, losses=losses, **how) <= 1 + ROUNDING
    assert moved(model, ragged, config, 2, losses=pooled_at_the_end, **how) > 1 + ROUNDING


def one_micro_batch(draw: Any, *_: Any, **__: Any) -> list[list[Any]]:
    """All rows in one batch, padded to the longest."""
    return [[draw]]


def test_dropout_measures_the_gradient_that_is_used() -> None:
    """In training mode: what is recorded and measured of each row is its gradient under the mask that it drew in this
    forward pass, not another's."""
    model = classifier("BERT").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    ids, labels = torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    trained = dict(model.named_parameters())

    def by_row(seed: int) -> list[dict[str, Tensor]]:
        torch.manual_seed(seed)
        found = losses(model, ids, labels)
        grads = [torch.autograd.grad(one, list(trained.values()), retain_graph=True) for one in found]
        return [dict(zip(trained, row, strict=True)) for row in grads]

    wanted, other = by_row(1), by_row(2)
    with PerExampleGradients(model) as recorder:
        torch.manual_seed(1)
        losses(model, ids, labels).sum().backward()
        recorded = recorder.take()
    found, norms = recorded.materialised(), recorded.squared_norms()
    for name in trained:
        for row in range(2):
            torch.testing.assert_close(found[name][row], wanted[row][name])
            torch.testing.assert_close(norms[name][row], wanted[row][name].square().sum())
    head = "classifier.weight"
    assert not torch.allclose(other[0][head], wanted[0][head])
    assert not torch.allclose(wanted[0][head].square().sum(), wanted[1][head].square().sum())
