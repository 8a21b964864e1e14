"""Before a private run, gradients are checked: if rows affect each other, privacy does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPTNeoConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    XLMConfig,
)

from dptune import CausalLMLoss, InvalidArgument, add_lora
from dptune.per_example import check
from tests.tiny import tiny_llama
from utils.models.trainable import check_rules, choose_trainable

CPU = torch.device("cpu")
SHORT_CONTEXT, WIDTH = 16, 40
SIZES: dict[str, Any] = {"vocab_size": 96, "max_position_embeddings": 64, "initializer_range": 0.3}
WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | WIDE | {"intermediate_size": 64, "pad_token_id": 0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "rope_theta": 1e4,
    "original_max_position_embeddings": SHORT_CONTEXT,
}


def neo() -> PreTrainedConfig:
    """Local attention, as long as eight tokens."""
    layers = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    return GPTNeoConfig(**SIZES, hidden_size=32, **layers)


MEET = {
    "positions that follow the longest row": (
        lambda: LlamaConfig(**LLAMA | {"max_position_embeddings": SHORT_CONTEXT}, rope_parameters=DYNAMIC),
        ["q_proj", "v_proj"],
    ),
    "positions that switch with the longest row": (
        lambda: Phi3Config(**LLAMA, original_max_position_embeddings=SHORT_CONTEXT, rope_parameters=LONG),
        ["qkv_proj"],
    ),
    "attention in both directions": (
        lambda: BertConfig(**SIZES | WIDE | {"intermediate_size": 64}),
        ["query", "value"],
    ),
    "attention in both directions by another name": (
        lambda: XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4, embed_init_std=0.3, init_std=0.3),
        ["q_lin", "v_lin"],
    ),
}
APART = {"Llama": (lambda: LlamaConfig(**LLAMA), ["q_proj", "v_proj"]), "GPT-Neo": (neo, ["q_proj", "v_proj"])}


def prepared(kind: Any, trained: str, dtype: torch.dtype = torch.float32) -> Any:
    config, targets = kind
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).to(dtype)
    if trained == "adapters":
        add_lora(model, rank=4, alpha=8.0, targets=targets)
    else:
        choose_trainable(model, ["all"])
    return model


@pytest.mark.parametrize(
    ("name", "trained"),
    # XLM changes what its layers give in place, so that they cannot be trained whole
    [(name, trained) for name in MEET for trained in ("adapters", "all") if (name[-4:], trained) != ("name", "all")],
)
def test_a_model_whose_rows_affect_each_other_is_refused(name, trained):
    model = prepared(MEET[name], trained)
    with pytest.raises(InvalidArgument, match="on its padding or on its neighbours"):
        check_rules(model, CausalLMLoss(model), CPU, width=WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", APART)
def test_a_model_with_separate_rows_is_left_unchanged(name, dtype):
    model = prepared(APART[name], "adapters", dtype).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_rules(model, CausalLMLoss(model), CPU, width=WIDTH)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in MEET if "follow" not in name])
def test_a_bfloat16_model_is_left_unchanged(name):
    """Rounding by the shape of the batch is tolerated there, and hides `dynamic` positions: `require_context` keeps
    rows within the context at which those begin."""
    model = prepared(MEET[name], "adapters", torch.bfloat16)
    with pytest.raises(InvalidArgument):
        check_rules(model, CausalLMLoss(model), CPU, width=WIDTH)


def test_in_any_precision_other_padding_of_the_same_width_changes_nothing(monkeypatch):
    """Where the comparison of gradients tolerates rounding, a weak look at padding is still found."""
    monkeypatch.setattr(check, "_compare", lambda *_, **__: None)
    model = prepared(MEET["attention in both directions"], "adapters", torch.bfloat16)
    with pytest.raises(InvalidArgument, match="depending on its padding and on other rows"):
        check_rules(model, CausalLMLoss(model), CPU, width=WIDTH)


class _Centred(nn.Module):
    """A frozen layer that subtracts the mean over the micro-batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.layer(hidden)
        return out - out.mean(0, keepdim=True)


def test_frozen_code_that_mixes_examples_is_refused_under_adapters():
    model = tiny_llama()
    model.model.layers[0].mlp = _Centred(model.model.layers[0].mlp)
    add_lora(model, rank=4, alpha=8.0, targets=["q_proj"])
    with pytest.raises(InvalidArgument, match="couple examples"):
        check_rules(model, CausalLMLoss(model), CPU, width=WIDTH)
