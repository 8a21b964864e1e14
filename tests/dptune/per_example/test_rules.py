"""Rules against autograd, one example at a time; a layer without a rule is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dptune import InvalidArgument, PerExampleGradients
from dptune._validate import present
from dptune.per_example import find_rule

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


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations_of_float16_are_computed_in_float32(name):
    """Squares of 1,000 overflow float16, and so do products of gradients that a loss scale has lengthened."""
    torch.manual_seed(0)
    layer = NORMALISATIONS[name]()
    x, grad = (1000 * torch.randn(3, 2, 5, 6)).half(), (4000 * torch.randn(3, 2, 5, 6)).half()
    rule = present(find_rule(layer), "rule")
    found, wanted = rule(layer, x, grad), rule(layer, x.double(), grad.double())
    for key, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), wanted[key], rtol=1e-4, atol=1)


def test_a_scaled_embeddings_gradient_does_not_overflow_float16():
    layer = Gemma3TextScaledWordEmbedding(20, 4, 0, embed_scale=50.0)
    ids, grad = torch.tensor([[3, 4, 3]]), torch.full((1, 3, 4), 30_000.0, dtype=torch.float16)
    rule = present(find_rule(layer), "rule")
    assert rule(layer, ids, grad)["weight"].squared_norms().sqrt().item() == pytest.approx(1.5e6 * 20**0.5, rel=1e-3)


class NotAnRMSNorm(nn.Module):
    """A layer that is named like an RMSNorm but computes something else."""

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
