"""The measured rate moves a logit by about one in a step, whatever the size of what the head reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptune import InvalidArgument
from dptune.integrations.peft import class_logits
from tests.classifiers import CLASSIFIERS, VOCABULARY
from utils.finetune_modes import head_modules
from utils.head_rate import measure_head_rate


def make(name: str, scale: float = 1.0) -> nn.Module:
    """A tiny classifier whose head reads values `scale` times as large."""
    torch.manual_seed(0)
    model = CLASSIFIERS[name]().train()
    if name == "Llama":
        model.model.norm.weight.data.mul_(scale)
    elif name == "GPT-2":
        model.transformer.ln_f.weight.data.mul_(scale)
    return model


def moved_by_one_step(model: nn.Module, rate: float) -> float:
    """How far one step of Adam on one row moves the logit of its class."""
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    head = [p for name in head_modules(model) for p in model.get_submodule(name).parameters()]
    optimizer = torch.optim.Adam(head, lr=rate)
    model.eval()
    before = class_logits(model, inputs)
    torch.nn.functional.cross_entropy(before, torch.tensor([1])).backward()
    optimizer.step()
    return float((class_logits(model, inputs) - before).detach()[0, 1])


@pytest.mark.parametrize(("name", "scale"), [("BERT", 1), ("Llama", 1), ("Llama", 30), ("GPT-2", 1), ("GPT-2", 0.1)])
def test_a_step_moves_a_logit_by_about_one(name: str, scale: float) -> None:
    model = make(name, scale)
    assert 0.5 < moved_by_one_step(model, measure_head_rate(model)) < 2


def test_larger_inputs_make_a_smaller_rate() -> None:
    assert measure_head_rate(make("Llama", 100)) == pytest.approx(measure_head_rate(make("Llama")) / 100)


def test_the_layer_with_the_largest_inputs_decides() -> None:
    model = make("RoBERTa")
    model.classifier.dense.weight.data.mul_(1e4)  # the second layer's inputs, behind tanh, are all near 1 now
    assert measure_head_rate(model) == pytest.approx(1 / 16, rel=0.3)
    model.classifier.dense.weight.data.zero_()  # they are 0 now: the first layer's decide
    assert measure_head_rate(model) > 0.03


def test_measuring_changes_nothing() -> None:
    model = make("BERT")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert measure_head_rate(model) == measure_head_rate(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.classifier._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_head_that_cannot_be_measured_needs_a_rate() -> None:
    model = make("BERT")
    model.classifier = nn.Sequential(nn.LayerNorm(16))
    with pytest.raises(InvalidArgument, match="--head_learning_rate=None: give one: BertForSequenceClassification's"):
        measure_head_rate(model)
