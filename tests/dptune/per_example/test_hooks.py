"""Per-example gradients against the oracle, and everything the recorder refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptune import CausalLMLoss, InvalidArgument, PerExampleGradients, add_lora
from dptune.per_example import Outer, find_rule
from tests.examples import padded, random_examples, randomise_adapters
from tests.reference import example_gradients
from tests.tiny import tiny_llama

TARGETS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "with head": ("q_proj", "v_proj", "lm_head")}


def adapted(rank: int = 4, targets: str = "attention", **kwargs) -> nn.Module:
    model = tiny_llama(**kwargs)
    add_lora(model, rank=rank, alpha=2.0 * rank, targets=TARGETS[targets])
    randomise_adapters(model)
    return model


def recorded(model: nn.Module, examples) -> dict[str, torch.Tensor]:
    loss = CausalLMLoss(model)
    with PerExampleGradients(model) as recorder:
        loss(*padded(examples)).sum().backward()
        return recorder.take().materialised()


def assert_equal_to_oracle(model: nn.Module, examples, tolerance: float) -> None:
    expected = example_gradients(model, examples)
    found = recorded(model, examples)
    assert set(found) == set(expected[0])
    for index, wanted in enumerate(expected):
        for name, grad in wanted.items():
            scale = max(other[name].norm().item() for other in expected)
            assert scale > 0, name
            torch.testing.assert_close(found[name][index].double(), grad, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_to_one_example_at_a_time(rank, targets, checkpointing):
    model = adapted(rank, targets)
    if checkpointing:
        model.train()  # transformers checkpoints in training mode only; this model has no dropout
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_equal_to_oracle(model, random_examples(5), 1e-4)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tie", [False, True])
def test_exact_in_float64(targets, tie):
    assert_equal_to_oracle(adapted(targets=targets, tie=tie).double(), random_examples(4), 1e-10)


@pytest.mark.parametrize("targets", TARGETS)
def test_bfloat16_base_gives_float32_gradients_near_the_oracle(targets):
    model = adapted(targets=targets)
    examples = random_examples(4)
    expected = example_gradients(model, examples)
    for name, parameter in model.named_parameters():
        if ".lora." not in name:
            parameter.data = parameter.data.bfloat16()
    found = recorded(model, examples)
    for name, grads in found.items():
        assert grads.dtype == torch.float32
        wanted = torch.stack([grad[name] for grad in expected])
        assert (grads - wanted).norm() < 0.05 * wanted.norm(), name  # bfloat16: 8 bits of mantissa, two layers


def test_the_weights_get_no_gradient_while_recording_and_are_trainable_after():
    model = adapted()
    recorded(model, random_examples(3))
    trained = [p for name, p in model.named_parameters() if ".lora." in name]
    assert trained
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained)
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_gone_after_an_error_too():
    model = adapted()
    with pytest.raises(ZeroDivisionError), PerExampleGradients(model):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_second_backward_pass_before_take_raises():
    model = adapted()
    loss, batch = CausalLMLoss(model), padded(random_examples(3))
    with PerExampleGradients(model) as recorder:
        loss(*batch).sum().backward()
        with pytest.raises(RuntimeError, match="second backward pass"):
            loss(*batch).sum().backward()
    with PerExampleGradients(model) as recorder:
        loss(*batch).sum().backward()
        first = recorder.take().materialised()
        loss(*batch).sum().backward()
        second = recorder.take().materialised()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_evaluation_records_nothing():
    model = adapted()
    with PerExampleGradients(model) as recorder:
        with torch.no_grad():
            CausalLMLoss(model)(*padded(random_examples(2)))
        assert not recorder.take()


class _Twice(nn.Module):
    """A layer that is used twice, and a weight that two layers share: one parameter each, whose uses add up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(self.one(x).tanh()).tanh())


def test_shared_layers_and_weights_are_counted_once_with_all_their_uses():
    torch.manual_seed(0)
    model = _Twice()
    x = torch.randn(4, 3)
    with PerExampleGradients(model) as recorder:
        model(x).square().sum().backward()
        found = recorder.take().materialised()
    assert set(found) == {"one.weight", "one.bias", "other.bias"}
    for index in range(4):
        wanted = torch.autograd.grad(model(x[index : index + 1]).square().sum(), list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(found[name][index], grad)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 2)), r"0\.weight=Conv2d"),
        (nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2)), r"1\.weight_ih_l0=GRU"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), r"1=BatchNorm1d"),
        (type("MyLinear", (nn.Linear,), {})(2, 2), "MyLinear"),
    ],
)
def test_what_no_rule_covers_is_refused_by_name(model, named):
    with pytest.raises(InvalidArgument, match=named):
        PerExampleGradients(model)


def test_a_parameter_of_the_model_itself_is_refused():
    model = tiny_llama()
    model.requires_grad_(False)
    model.register_parameter("loose", nn.Parameter(torch.zeros(2)))
    with pytest.raises(InvalidArgument, match="loose=LlamaForCausalLM"):
        PerExampleGradients(model)


def test_reentrant_checkpointing_is_not_silently_wrong():
    model = adapted().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    loss, batch = CausalLMLoss(model), padded(random_examples(3))
    with PerExampleGradients(model), pytest.raises(RuntimeError, match="non-reentrant"):
        loss(*batch).sum().backward()


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (4, 2, 5, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_rule_for_any_number_of_middle_dimensions(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2, bias=bias), torch.randn(shape)
    rule = find_rule(layer)
    assert rule is not None
    grad = torch.randn(*shape[:-1], 2)
    found = rule(layer, x, grad)
    assert set(found) == {name for name, _ in layer.named_parameters()}
    for index in range(4):
        for parameter, wanted in zip(
            layer.named_parameters(),
            torch.autograd.grad((layer(x[index]) * grad[index]).sum(), list(layer.parameters())),
            strict=True,
        ):
            own = found[parameter[0]]
            torch.testing.assert_close((own.materialised() if isinstance(own, Outer) else own)[index], wanted)
