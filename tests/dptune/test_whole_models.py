"""Every parameter of whole models: per-example gradients, norms and private sums against the one-at-a-time oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dptune import CausalLMLoss, InvalidArgument, Ledger, PerExampleGradients, PrivateStep
from dptune.per_example import Recorded, require_exact_gradients, uses
from tests.examples import padded, random_examples
from tests.private_sum import NoNoise, config_for, private_sum
from tests.reference import clipped_sum, example_gradients, flat
from tests.whole_models import CAUSAL, ENCODERS, squared_outputs, whole_model

# Among them one with a token that comes again and again, and one of two tokens.
EXAMPLES = [*random_examples(4, seed=3), ([7, 5, 7, 7, 9, 7], [-100, 5, 7, -100, 9, 7]), ([8, 6], [-100, 6])]
WEIGHTS = torch.arange(1.0, len(EXAMPLES) + 1, dtype=torch.float64)
# Normalisations of the transformers library compute in float32 whatever they are given.
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
    """Its norm is not that of the last use, nor the root of both uses' squares."""
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


def add_weighted_sum(use: uses.Outer, total: Tensor, weights: Tensor) -> None:
    for _ in use.adding_weighted_sum(total, weights):
        pass


@pytest.mark.parametrize("left", [3e-3, 3.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("seed", range(5))
def test_an_example_whose_tokens_cancel_is_clipped_like_any_other(left, scale, seed, tmp_path, monkeypatch):
    """In float32 its ghost norm is a small difference of large products: it came out as 0, and nothing was clipped."""
    monkeypatch.setattr(uses, "_WORTH", 0)
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(512, 512, bias=False)
    token, pull, rest = (torch.randn(512, generator=generator) for _ in range(3))
    tokens, pulls = token.expand(1, 2, 512) * scale, torch.stack([300 * pull, left * rest - 300 * pull])[None]
    config = config_for(1, clip_norm=1.0)
    with PrivateStep(layer, config, ledger=Ledger(tmp_path / "ledger"), noise=NoNoise(512 * 512)) as step:
        stats = step.backward((layer(tokens) * pulls).sum((1, 2)))
        wanted = torch.linalg.matrix_norm((pulls.double().sum((0, 1)))[:, None] * tokens[0, 0].double())
        assert stats.norms.item() >= wanted.item() * (1 - 1e-6)
        if left == 3.0:  # not too short to be measured
            assert stats.norms.item() <= wanted.item() * (1 + 1e-6)
        assert 0 < step._begun().norm() <= 1 + 1e-5


def test_a_tied_embedding_whose_uses_cancel_is_clipped_like_any_other():
    """Its norm by uses alone is large, that of their sum small, and what is summed is rounded to the large ones."""
    generator = torch.Generator().manual_seed(0)
    ids, right = torch.tensor([[3]]), 1e4 * torch.randn(1, 1, 64, generator=generator)
    rest = 1e-3 * torch.randn(1, 1, 64, generator=generator)
    one_hot = F.one_hot(ids, 20).float()
    own = [uses.Outer(-one_hot, right, 20), uses.Outer(ids, right + rest, 20)]
    total = torch.zeros(20, 64)
    squared = Recorded({"weight": list(own)}).squared_norms()["weight"]
    Recorded({"weight": list(own)}).add_weighted_sums({"weight": total}, {"weight": squared.rsqrt()})
    exact = (right + rest).double() - right.double()
    assert squared.sqrt() >= exact.norm()
    assert 0 < total.norm() <= 1 + 1e-5


def test_norms_of_tokens_that_do_not_cancel_are_not_computed_twice(monkeypatch):
    monkeypatch.setattr(uses, "_WORTH", 0)
    kept = recorded(whole_model("GPT-2").float())
    monkeypatch.setattr(uses.Outer, "exactly", lambda _: pytest.fail("a norm was computed again"))
    assert kept.squared_norms()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_float32_or_better_whatever_the_factors(dtype):
    """Products of bfloat16 numbers, added up in bfloat16, gave norms 0.5% too small."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 40, size, generator=generator).to(dtype) for size in (30, 50))
    for use in (uses.Outer(left, right, 30), uses.Outer(torch.randint(0, 9, (3, 40), generator=generator), right, 9)):
        exact = F.one_hot(use.left, 9).double() if use.is_lookup else use.left.double()
        wanted = torch.einsum("btm,btn->bmn", exact, right.double())
        torch.testing.assert_close(use.squared_norms(), wanted.square().sum((1, 2)), rtol=1e-5, atol=0)
        total = torch.zeros(use.rows, 50)
        add_weighted_sum(use, total, torch.tensor([1.0, 0.5, 2.0]))
        summed = torch.einsum("b,bmn->mn", torch.tensor([1.0, 0.5, 2.0]).double(), wanted)
        torch.testing.assert_close(total.double(), summed, rtol=1e-4, atol=1e-4)


def test_factors_in_lower_precision_are_cast_a_few_examples_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, 7, size, generator=generator).bfloat16() for size in (30, 50))
    use, lookup = uses.Outer(left, right, 30), uses.Outer(torch.randint(0, 30, (5, 7), generator=generator), right, 30)

    def everything() -> list[Tensor]:
        totals = [torch.zeros(30, 50), torch.zeros(30, 50)]
        for one, total in zip((use, lookup), totals, strict=True):
            add_weighted_sum(one, total, WEIGHTS[:5])
        return [use.squared_norms(), lookup.squared_norms(), use.inner_products(lookup), *totals]

    whole = everything()
    monkeypatch.setattr(uses, "_CAST_ELEMENTS", 2 * 7 * 50)
    for found, wanted in zip(everything(), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_norm_by_ghost_products_makes_nothing_of_the_vocabularys_size(monkeypatch):
    """For an embedding of 1,000,000 rows a dense gradient an example would take 4 GB."""
    layer = nn.Embedding(1_000_000, 1)
    with PerExampleGradients(layer) as recorder:
        layer(torch.tensor([[3, 999_999, 3], [1, 2, 3]])).square().sum((1, 2)).sum().backward()
        monkeypatch.setattr(torch.Tensor, "new_zeros", _small_zeros)
        norms = recorder.take().squared_norms()["weight"]
    rows = layer.weight.detach().double().flatten()
    wanted = [(4 * rows[3]) ** 2 + (2 * rows[999_999]) ** 2, sum((2 * rows[row]) ** 2 for row in (1, 2, 3))]
    torch.testing.assert_close(norms, torch.stack(wanted))


_new_zeros = torch.Tensor.new_zeros


def _small_zeros(self, *size, **how):
    made = _new_zeros(self, *size, **how)
    assert made.numel() < 100
    return made


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
    with pytest.raises(InvalidArgument, match=r"embedding\.weight: its per-example gradients are not autograd's"):
        require_exact_gradients(model := _ElsewhereToo(), squares(model), ids)
    with pytest.raises(InvalidArgument, match=r"middle\.weight: its per-example gradients are not autograd's"):
        require_exact_gradients(model := _TimeFirst(), squares(model), ids)
    with pytest.raises(RuntimeError, match="embedding: saw 3 examples where another layer saw 5"):
        require_exact_gradients(model := _TimeFirst(), squares(model), torch.randint(0, 20, (3, 5)))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_check_passes_on_models_that_train_and_leaves_them_as_they_were(name):
    model = whole_model(name).float().train()
    ids = torch.randint(3, 400, (3, 7), generator=torch.Generator().manual_seed(0))
    require_exact_gradients(model, CausalLMLoss(model), ids, ids)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


NORMALISATIONS = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LayerNorm, scale only": lambda: nn.LayerNorm(6, bias=False),
    "LayerNorm of two dimensions": lambda: nn.LayerNorm((5, 6)),
    "RMSNorm": lambda: nn.RMSNorm(6, eps=1e-3),
    "Llama's": lambda: LlamaRMSNorm(6, eps=1e-3),
    "T5's": lambda: T5LayerNorm(6, eps=1e-3),
    "Gemma's": lambda: GemmaRMSNorm(6, eps=1e-3),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("tokens", [(5,), (2, 5)])
def test_normalisations(name, tokens):
    torch.manual_seed(0)
    layer, x, weights = NORMALISATIONS[name](), torch.randn(4, *tokens, 6), torch.randn(4, *tokens, 6)
    for parameter in layer.parameters():
        parameter.data.normal_()
    with PerExampleGradients(layer) as recorder:
        (layer(x) * weights).sum().backward()
        made = recorder.take().materialised()
    assert set(made) == {key for key, _ in layer.named_parameters()}
    for index in range(4):
        wanted = torch.autograd.grad((layer(x[index]) * weights[index]).sum(), list(layer.parameters()))
        for own, grad in zip(made.values(), wanted, strict=True):
            torch.testing.assert_close(own[index], grad, rtol=1e-4, atol=1e-5)


class NotAnRMSNorm(nn.Module):
    """Its name says so, what it computes does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class _Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(8, 2)


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 4)), r"0\.weight=Conv2d: no per-example rule"),
        (NotAnRMSNorm(), r"weight=NotAnRMSNorm: no per-example rule"),
        (_Distances(), r"relative_attention_bias\.weight=Embedding: looks up distances"),
        (nn.Embedding(5, 2, max_norm=1.0), r"weight=Embedding: max_norm"),
        (nn.Embedding(5, 2, sparse=True), r"weight=Embedding: max_norm, scale_grad_by_freq and sparse"),
        (nn.GRU(3, 4), r"weight_ih_l0=GRU: no per-example rule"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(model, refused):
    with pytest.raises(InvalidArgument, match=refused):
        PerExampleGradients(model)


def test_ids_without_examples_are_refused():
    layer = nn.Embedding(5, 2)
    with PerExampleGradients(layer), pytest.raises(RuntimeError, match=r"ids of shape \(3,\); .* \[B, T\]"):
        layer(torch.tensor([1, 2, 3]))


def test_a_forward_pass_that_failed_leaves_no_number_of_examples_behind():
    model = whole_model("GPT-2")
    expected = example_gradients(model, EXAMPLES[:1])
    with PerExampleGradients(model) as recorder:
        model(input_ids=padded(EXAMPLES)[0])  # out of memory after it, say
        CausalLMLoss(model)(*padded(EXAMPLES[:1])).sum().backward()
        assert_is(recorder.take(), expected, 1e-10)


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
