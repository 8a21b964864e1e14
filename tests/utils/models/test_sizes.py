"""Counts that the estimate of memory starts from; `test_memory.py` holds what it makes of them against allocations."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

from dptune.lora import adapters, add_lora
from tests.utils.models.test_memory import ATTENTION, MLP, SHAPE, build, sizes_of
from utils.models.sizes import model_sizes

H, INNER, HEADS, KEY_VALUE, LAYERS = 128, 344, 8, 32, 6


def test_parameters_are_split_into_layers_and_the_rest() -> None:
    model = build(LlamaConfig(**SHAPE))
    sizes = sizes_of(model)
    trained = sum(adapter.A.weight.numel() + adapter.B.weight.numel() for _, adapter in adapters(model))
    assert (sizes.layers, sizes.hidden, sizes.vocabulary, sizes.heads) == (LAYERS, H, 500, HEADS)
    assert sizes.trained == trained
    assert sizes.frozen == sum(p.numel() for p in model.parameters()) - trained
    assert sizes.linear == 2 * H * H + 2 * H * KEY_VALUE + 3 * H * INNER
    assert sizes.largest_linear == H * INNER
    assert sizes.layer == sizes.linear + 2 * H
    assert sizes.frozen == sizes.root + LAYERS * sizes.layer


def test_values_that_backward_keeps_of_a_llama() -> None:
    sizes = sizes_of(build(LlamaConfig(**SHAPE)))
    assert sizes.exact == 2 * H + HEADS
    assert sizes.plain == 2 * H + 2 * KEY_VALUE + 3 * INNER
    assert sizes.scores == 0


@pytest.mark.parametrize("targets", [ATTENTION, ("q_proj",)])
def test_a_tensor_that_several_adapters_read_counts_once(targets: Any) -> None:
    """o_proj's input is as wide as that of the others, and attention keeps it anyway."""
    sizes = sizes_of(build(LlamaConfig(**SHAPE), targets=targets))
    assert (sizes.adapter_inputs, sizes.adapter_own) == (LAYERS * H, LAYERS * 8 * len(targets))


def test_adapters_in_the_mlp_share_an_input_of_their_own() -> None:
    sizes = sizes_of(build(LlamaConfig(**SHAPE), targets=MLP))
    assert sizes.adapter_inputs == LAYERS * (H + INNER)
    assert sizes.adapter_widest == INNER


def test_with_dropout_each_adapter_keeps_an_input_of_its_own() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    add_lora(model, rank=8, targets=ATTENTION, dropout=0.1)
    sizes = sizes_of(model)
    assert (sizes.adapter_inputs, sizes.adapter_own) == (0, LAYERS * 4 * (8 + H))


def test_scores_are_kept_where_attention_is_written_out() -> None:
    config = LlamaConfig(**SHAPE)
    config._attn_implementation = "eager"
    assert sizes_of(build(config)).scores == 6
    soft = Gemma2Config(**SHAPE, head_dim=16)
    soft._attn_implementation = "eager"
    sizes = sizes_of(build(soft))
    assert sizes.scores == 8
    assert sizes.whole_logits, "its logits are capped"


def test_a_written_out_gelu_keeps_more_than_a_gate() -> None:
    shape = {"n_embd": H, "n_layer": 2, "n_head": HEADS, "vocab_size": 500}
    kept = {
        name: sizes_of(build(GPT2Config(**shape, activation_function=name), targets=("c_attn",))).plain
        for name in ("gelu_new", "gelu")
    }
    assert kept["gelu_new"] - kept["gelu"] == 3 * 4 * H


def test_the_experts_of_a_token_count_and_a_trained_head_is_seen() -> None:
    sparse = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    assert sizes_of(build(sparse)).plain == 2 * H + 2 * KEY_VALUE + 3 * 2 * INNER
    assert sizes_of(build(LlamaConfig(**SHAPE), targets=("lm_head",))).trained_head
    assert not sizes_of(build(LlamaConfig(**SHAPE))).trained_head


def test_a_model_without_known_layers_has_no_sizes() -> None:
    model = build(LlamaConfig(**SHAPE))
    model._no_split_modules = None
    assert model_sizes(model) is None
