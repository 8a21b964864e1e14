"""Tiny random models of the architectures that can be trained whole, without dropout, away from their start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY = 400
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 256}
_BERT = {**_SIZES, "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _gpt2(tie: bool = True) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 256}
    config = GPT2Config(
        **sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tie
    )
    return GPT2LMHeadModel(config)


def _opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=256, dropout=0.0)
    )


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": _gpt2,
    "GPT-2, untied": lambda: _gpt2(tie=False),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "Llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "OPT": _opt,
    "Gemma 2": lambda: Gemma2ForCausalLM(Gemma2Config(**_LLAMA, num_key_value_heads=1, head_dim=8)),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_LLAMA, num_key_value_heads=1, head_dim=8)),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "BERT, masked words": lambda: BertForMaskedLM(BertConfig(**_BERT)),
    "BERT, classes": lambda: BertForSequenceClassification(BertConfig(**_BERT, num_labels=3)),
    "RoBERTa, classes": lambda: RobertaForSequenceClassification(
        RobertaConfig(**_BERT, num_labels=3, max_position_embeddings=64)
    ),
}


def whole_model(name: str) -> Any:
    """The model in float64, every parameter trained, in evaluation mode."""
    torch.manual_seed(0)
    model = (CAUSAL | ENCODERS)[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def squared_outputs(model: Any, ids: Tensor) -> Tensor:
    """One loss per example for models that are not causal language models: the mean square of the outputs, [B]."""
    squares: Tensor = model(input_ids=ids).logits.square()
    return squares.flatten(1).mean(1)
