"""Every parameter of whole models: per-example gradients, norms and private sums equal those of one example alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, InvalidArgument, PerExampleGradients
from dptune.per_example import Recorded, uses
from tests.examples import padded, random_examples
from tests.private_sum import config_for, private_sum
from tests.reference import clipped_sum, example_gradients, flat
from tests.whole_models import CAUSAL, ENCODERS, squared_outputs, whole_model

# Including an example that repeats one token, and one of two tokens.
EXAMPLES = [*random_examples(4, seed=3), ([7, 5, 7, 7, 9, 7], [-100, 5, 7, -100, 9, 7]), ([8, 6], [-100, 6])]
WEIGHTS = torch.arange(1.0, len(EXAMPLES) + 1, dtype=torch.float64)
# Normalisations of the transformers library compute in float32 for any input.
EXACT = {"GPT-2": 1e-10, "GPT-2, untied": 1e-10, "OPT": 1e-10}


def recorded(model: nn.Module, examples=EXAMPLES) -> Recorded:
    with PerExampleGradients(model) as recorder:
        CausalLMLoss(model)(*padded(examples)).sum().backward()
        return recorder.take()


def checkpointed(model: nn.Module) -> nn.Module:
    model.train()  # these models have no dropout
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def assert_is(recorded: Recorded, expected: list[dict[str, Tensor]], tolerance: float) -> None:
    """Norms, and a weighted sum, of every parameter."""
    norms = recorded.squared_norms()
    sums = {name: torch.zeros_like(grad) for name, grad in expected[0].items()}
    recorded.add_weighted_sums(sums, dict.fromkeys(norms, WEIGHTS[: len(expected)]))
    whole = torch.stack([flat(grads) for grads in expected]).norm()
    for name in expected[0]:
        wanted = torch.stack([grads[name] for grads in expected])
        own = wanted.flatten(1).norm(dim=1)
        scale = tolerance * (own.max() + 1e-6 * whole)
        torch.testing.assert_close(norms[name].sqrt(), own, rtol=0, atol=float(scale), msg=name)
        total = torch.einsum("b,b...->...", WEIGHTS[: len(expected)], wanted)
        assert (sums[name] - total).norm() <= 10 * len(expected) * scale, name


@pytest.mark.parametrize("kept", ["ghost norms", "materialised"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_equal_one_example_at_a_time(name, checkpointing, kept, monkeypatch):
    monkeypatch.setattr(uses, "_WORTH", 0 if kept == "ghost norms" else 1e9)
    model = whole_model(name)
    expected = example_gradients(model, EXAMPLES)
    assert {key for grads in expected for key, grad in grads.items() if grad.any()} == set(expected[0])
    assert_is(recorded(checkpointed(model) if checkpointing else model), expected, EXACT.get(name, 1e-5))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_equal_one_example_at_a_time(name):
    model, ids = whole_model(name), torch.randint(5, 400, (4, 9), generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    expected = []
    for row in ids:
        grads = torch.autograd.grad(squared_outputs(model, row[None]).sum(), list(parameters.values()))
        expected.append(dict(zip(parameters, grads, strict=True)))
    with PerExampleGradients(model) as recorder:
        squared_outputs(model, ids).sum().backward()
        assert_is(recorder.take(), expected, 1e-10)


@pytest.mark.parametrize("clipping", ["inactive", "active", "mixed"])
@pytest.mark.parametrize("token_budget", [1, 10_000])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "OPT"])
def test_the_private_sum_of_a_whole_model_is_the_oracles(name, token_budget, clipping):
    model = whole_model(name)
    expected = example_gradients(model, EXAMPLES)
    norms = sorted(flat(grads).norm().item() for grads in expected)
    clip_norm = {"inactive": 2 * norms[-1], "active": norms[0] / 2, "mixed": norms[len(norms) // 2]}[clipping]
    config = config_for(len(EXAMPLES), clip_norm=clip_norm)
    found = private_sum(model, EXAMPLES, range(len(EXAMPLES)), config, token_budget=token_budget)
    wanted = clipped_sum(expected, clip_norm, len(found))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["GPT-2", "Llama, tied"])
def test_taking_one_example_out_moves_the_sum_by_at_most_c(name):
    model, clip_norm = whole_model(name), 0.1
    config = config_for(len(EXAMPLES), clip_norm=clip_norm)
    everyone = list(range(len(EXAMPLES)))
    whole = private_sum(model, EXAMPLES, everyone, config)
    for left_out in everyone:
        others = [index for index in everyone if index != left_out]
        moved = (whole - private_sum(model, EXAMPLES, others, config)).norm()
        assert 0.99 * clip_norm < moved <= clip_norm * (1 + 1e-5)


def test_a_tied_embedding_counts_both_uses_once():
    """Its norm is neither that of the last use nor the root of the sum of both uses' squares."""
    model = whole_model("GPT-2")
    expected = example_gradients(model, EXAMPLES)
    norms = recorded(model).squared_norms()["transformer.wte.weight"].sqrt()
    untied = whole_model("GPT-2, untied")
    untied.lm_head.weight.data = untied.transformer.wte.weight.data.clone()
    for own, other in zip(model.transformer.h.parameters(), untied.transformer.h.parameters(), strict=True):
        other.data = own.data.clone()
    apart = [grads["transformer.wte.weight"].norm().item() for grads in expected]
    torch.testing.assert_close(norms, torch.tensor(apart, dtype=torch.float64), rtol=1e-10, atol=0)
    parts = recorded(untied).squared_norms()
    rooted = (parts["transformer.wte.weight"] + parts["lm_head.weight"]).sqrt()
    assert ((norms - rooted).abs() > 1e-4 * norms).all()


def test_norms_of_tokens_that_do_not_cancel_are_not_computed_twice(monkeypatch):
    monkeypatch.setattr(uses, "_WORTH", 0)
    kept = recorded(whole_model("GPT-2").float())
    monkeypatch.setattr(uses.Outer, "exactly", lambda _: pytest.fail("a norm was computed again"))
    assert kept.squared_norms()


SUBSETS = {"biases": ".bias", "normalisations": "ln_", "positions": "wpe"}


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_subset_of_the_parameters(subset):
    model = whole_model("GPT-2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(SUBSETS[subset] in name)
    found = recorded(model)
    expected = example_gradients(model, EXAMPLES)
    assert 0 < len(expected[0]) < len(list(model.parameters()))
    assert_is(found, expected, 1e-10)


def test_padding_of_an_embedding_trains_nothing():
    layer = nn.Embedding(10, 3, padding_idx=0)
    ids = torch.tensor([[1, 0, 0], [2, 3, 0]])
    with PerExampleGradients(layer) as recorder:
        layer(ids).sum((1, 2)).sum().backward()
        made = recorder.take().materialised()["weight"]
    assert not made[:, 0].any()
    assert made[1, 2].tolist() == [1, 1, 1]


def test_ids_without_examples_are_refused():
    layer = nn.Embedding(5, 2)
    with PerExampleGradients(layer), pytest.raises(InvalidArgument, match=r"^the model: its ids are not \[B, T\]"):
        layer(torch.tensor([1, 2, 3]))


def test_a_forward_pass_that_failed_leaves_no_number_of_examples_behind():
    model = whole_model("GPT-2")
    expected = example_gradients(model, EXAMPLES[:1])
    with PerExampleGradients(model) as recorder:
        model(input_ids=padded(EXAMPLES)[0])  # for example out of memory after it
        CausalLMLoss(model)(*padded(EXAMPLES[:1])).sum().backward()
        assert_is(recorder.take(), expected, 1e-10)
