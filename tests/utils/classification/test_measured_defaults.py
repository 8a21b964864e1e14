"""The measured rate moves a logit by about one in a step, whatever the size of what the head reads; the measured clip
norm is just above the typical gradient of a model that has learned nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dptune import InvalidArgument
from dptune.integrations.peft import class_logits
from dptune.mechanism import PrivacyConfig
from tests.classifiers import CLASSIFIERS, VOCABULARY
from utils.classification.measured_defaults import measure_clip_norm, measure_head_rate, rates_of_model
from utils.classification.mode_defaults import plain_whole_rate
from utils.classification.modes import head_modules, prepare_mode
from utils.training.chosen_defaults import private_rate_of, whole_rate


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
    with pytest.raises(
        InvalidArgument, match="--head_learning_rate=None: must be given: BertForSequenceClassification's"
    ):
        measure_head_rate(model)


# --- clip norm


def in_mode(name: str, mode: str, scale: float = 1.0) -> nn.Module:
    model, _ = prepare_mode(make(name, scale), mode, lora_r=2, lora_target_modules=None, num_prepend_tokens=3)
    return model


def norms_of(model: nn.Module, count: int = 40) -> torch.Tensor:
    """Gradient norms of single rows that the measurement has not seen, of several lengths, classes in turns [count]."""
    generator, norms = torch.Generator().manual_seed(9), []
    model.eval()
    for row in range(count):
        ids = torch.randint(3, VOCABULARY, (1, 5 + row % 12), generator=generator)
        model.zero_grad()
        logits = class_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        torch.nn.functional.cross_entropy(logits, torch.tensor([row % 2])).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        norms.append(torch.cat(gradients).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("mode", ["full", "last-layer", "lora", "ia3", "prefix", "soft-prompt"])
@pytest.mark.parametrize(("name", "scale"), [("BERT", 1), ("Llama", 1), ("Llama", 30)])
def test_the_clip_norm_is_just_above_a_typical_gradient_at_the_start(name: str, scale: float, mode: str) -> None:
    model = in_mode(name, mode, scale)
    measured, norms = measure_clip_norm(model), norms_of(model)
    assert 0.5 * norms.median() < measured < 3 * norms.median()


def test_the_clip_norm_has_two_digits_and_is_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_mode("BERT", "last-layer")
    plain = torch.autograd.grad
    for typical, rounded in ((0.0123, 0.013), (0.2, 0.2), (0.994, 1.0), (1.17, 1.2), (31.2, 32.0)):
        lengths = iter([typical] * 10 + [0.001] * 3 + [1e5] * 3)  # the median is one of the ten

        def of_length(_loss: torch.Tensor, trained: list[nn.Parameter], lengths: Any = lengths, **_: Any) -> Any:
            length = next(lengths)
            return (torch.tensor([length], dtype=torch.float64), *([None] * (len(trained) - 1)))

        monkeypatch.setattr(torch.autograd, "grad", of_length)
        assert measure_clip_norm(model) == rounded
    monkeypatch.setattr(torch.autograd, "grad", plain)


def test_measuring_a_clip_norm_changes_nothing() -> None:
    model = in_mode("BERT", "lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    model.train()
    assert measure_clip_norm(model) == measure_clip_norm(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradients_without_a_length_need_a_clip_norm() -> None:
    model = in_mode("Llama", "last-layer")
    model.model.norm.weight.data.zero_()
    with pytest.raises(InvalidArgument, match=r"--clip_norm=None: cannot be measured: .* norm 0.0"):
        measure_clip_norm(model)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InvalidArgument, match=r"--clip_norm=None: cannot be measured: .* norm nan"):
        measure_clip_norm(model)


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_the_rate_of_a_whole_model_goes_by_its_width_and_the_noise(name: str) -> None:
    model = make(name)
    width = model.config.hidden_size
    quiet, loud = (
        PrivacyConfig(
            num_examples=8_000,
            expected_batch_size=256,
            steps=60,
            clip_norm=1.0,
            noise_multiplier=noise,
            delta=1e-5,
            noise_bands=8,
        )
        for noise in (0.5, 50.0)
    )
    assert rates_of_model(model, None, "adamw").whole() == plain_whole_rate(width)
    assert rates_of_model(model, quiet, "adamw").whole() == whole_rate(width)
    for config in (quiet, loud):
        found = rates_of_model(model, config, "lowpass-adam").whole()
        assert found == private_rate_of(model, config, "lowpass-adam", whole=True) < whole_rate(width)
