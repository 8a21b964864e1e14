"""Each mode trains exactly what it says, on an encoder and on a decoder."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OpenAIGPTConfig,
    OpenAIGPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dptune import InvalidArgument
from dptune.lora import adapters
from tests.classifier_folders import SIZES
from utils.classification import modes as finetune_modes
from utils.classification.mode_defaults import MODES
from utils.classification.modes import head_modules, head_parameters, prepare_mode

LAYERS = range(SIZES["num_hidden_layers"])
SELF = "bert.encoder.layer.{}.attention.self"
BERT_HEAD = {"classifier.weight", "classifier.bias"}
COPIED = "base_model.classifier.modules_to_save.default"


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3))


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, num_key_value_heads=1))


def each(pattern: str, *parts: str) -> set[str]:
    """`pattern` for every layer, with each of the parts behind it."""
    return {f"{pattern.format(layer)}.{part}" for layer in LAYERS for part in parts}


LORA = ("lora.A.weight", "lora.B.weight")
BERT_LORA = {f"{name}.{part}" for name in each(SELF, "query", "value") for part in LORA}
BERT_IA3 = {
    f"base_model.model.{name}.ia3_l.default"
    for name in each(SELF, "key", "value") | each("bert.encoder.layer.{}", "attention.output.dense", "output.dense")
}
COPIED_HEAD = {f"{COPIED}.weight", f"{COPIED}.bias"}
PROMPT = {"prompt_encoder.default.embedding.weight"}
PROJECTED = {f"prompt_encoder.default.transform.{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")}

OF_BERT = {
    "full": {name for name, _ in bert().named_parameters()},
    "last-layer": BERT_HEAD,
    "lora": BERT_LORA | BERT_HEAD,
    "ia3": BERT_IA3 | {name.replace("base_model.", "base_model.model.", 1) for name in COPIED_HEAD},
    "prefix": PROMPT | COPIED_HEAD,
    "soft-prompt": PROMPT | COPIED_HEAD,
    "soft-prompt+lora": PROMPT | COPIED_HEAD | {f"base_model.{name}" for name in BERT_LORA},
    "prefix+lora": PROMPT | COPIED_HEAD | {f"base_model.{name}" for name in BERT_LORA},
    "bias-only": {name for name, _ in bert().named_parameters() if name.endswith(".bias")} | BERT_HEAD,
}

ATTENTION = "model.layers.{}.self_attn"
LLAMA_HEAD = {"score.weight"}
LLAMA_LORA = {f"{name}.{part}" for name in each(ATTENTION, "q_proj", "v_proj") for part in LORA}
LLAMA_IA3 = {
    f"base_model.model.{name}.ia3_l.default"
    for name in each(ATTENTION, "k_proj", "v_proj") | each("model.layers.{}", "mlp.down_proj")
}
COPIED_SCORE = {"base_model.score.modules_to_save.default.weight"}
OF_LLAMA = {
    "full": {name for name, _ in llama().named_parameters()},
    "last-layer": LLAMA_HEAD,
    "lora": LLAMA_LORA | LLAMA_HEAD,
    "ia3": LLAMA_IA3 | {"base_model.model.score.modules_to_save.default.weight"},
    "prefix": PROMPT | COPIED_SCORE,
    "soft-prompt": PROMPT | COPIED_SCORE,
    "soft-prompt+lora": PROMPT | COPIED_SCORE | {f"base_model.{name}" for name in LLAMA_LORA},
    "prefix+lora": PROMPT | COPIED_SCORE | {f"base_model.{name}" for name in LLAMA_LORA},
}


@pytest.mark.parametrize(("make", "wanted"), [(bert, OF_BERT), (llama, OF_LLAMA)], ids=["BERT", "Llama"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains_exactly_what_it_says(mode: str, make: Any, wanted: dict[str, set[str]]) -> None:
    if mode not in wanted:
        with pytest.raises(InvalidArgument, match="--finetune_mode='bias-only': LlamaForSequenceClassification has no"):
            prepare_mode(make(), mode)
        return
    model, names = prepare_mode(make(), mode, num_prepend_tokens=4)
    assert set(names) == wanted[mode]
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("mode", "make"),
    [*((mode, bert) for mode in MODES), *((mode, llama) for mode in MODES if mode != "bias-only")],  # it has no biases
)
def test_the_heads_parameters_are_known_in_every_mode(mode: str, make: Any) -> None:
    model, names = prepare_mode(make(), mode)
    head = head_parameters(model, names)
    wanted = {"classifier.weight", "classifier.bias"} if make is bert else {"score.weight"}
    assert {re.sub(r"^base_model\.(model\.)?|modules_to_save\.default\.", "", name) for name in head} == wanted
    assert set(head) <= set(names)


def test_the_number_of_virtual_tokens_and_the_adapters_settings_arrive() -> None:
    model, _ = prepare_mode(
        bert(), "soft-prompt+lora", lora_r=3, lora_alpha=6.0, lora_dropout=0.25, num_prepend_tokens=7
    )
    assert model.prompt_encoder["default"].embedding.weight.shape == (7, SIZES["hidden_size"])
    found = [adapter for _, adapter in adapters(model)]
    assert [(adapter.rank, adapter.alpha, adapter.dropout.p) for adapter in found] == [(3, 6.0, 0.25)] * 4


def test_a_soft_prompt_begins_as_words_of_the_vocabulary() -> None:
    model, _ = prepare_mode(bert(), "soft-prompt", num_prepend_tokens=6)
    words = model.get_base_model().bert.embeddings.word_embeddings.weight
    prompt = model.prompt_encoder["default"].embedding.weight
    assert (prompt[:, None] == words[None]).all(2).any(1).all()


def test_a_projected_prefix_trains_its_network() -> None:
    _, names = prepare_mode(bert(), "prefix", prefix_projection=True)
    assert set(names) == PROMPT | PROJECTED | COPIED_HEAD


def test_layers_for_lora_by_name() -> None:
    _, names = prepare_mode(bert(), "lora", lora_target_modules=["key"])
    assert set(names) == {f"{name}.{part}" for name in each(SELF, "key") for part in LORA} | BERT_HEAD


def test_modules_that_the_checkpoint_lacks_are_trained_with_the_head() -> None:
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert set(prepare_mode(bert(), "last-layer", also_trained=["bert.pooler.dense"])[1]) == BERT_HEAD | pooler
    copied = {f"base_model.bert.pooler.dense.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    assert set(prepare_mode(bert(), "prefix", also_trained=["bert.pooler.dense"])[1]) == PROMPT | COPIED_HEAD | copied


def test_a_head_of_several_layers_is_trained_whole() -> None:
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=2))
    assert head_modules(model) == ["classifier"]
    wanted = {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")}
    assert set(prepare_mode(model, "last-layer")[1]) == wanted


def test_what_does_not_fit_the_model_is_one_line() -> None:
    model = bert()
    model.config.model_type = "unheard-of"
    with pytest.raises(
        InvalidArgument, match="--lora_target_modules=None: must be given for a model of type unheard-of"
    ):
        prepare_mode(model, "lora")
    electra = ElectraForSequenceClassification(ElectraConfig(**SIZES))
    with pytest.raises(InvalidArgument, match="--finetune_mode='ia3': PEFT does not support it for Electra"):
        prepare_mode(electra, "ia3")
    with pytest.raises(InvalidArgument, match="targets='nothing': matches no linear layer"):
        prepare_mode(bert(), "lora", lora_target_modules=["nothing"])
    with pytest.raises(InvalidArgument, match="no classification head"):
        head_modules(_headless())


def _headless() -> Any:
    model = bert()
    del model.classifier
    return model


def albert() -> Any:
    return AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=8))


def openai_gpt() -> Any:
    config = OpenAIGPTConfig(vocab_size=23, n_positions=64, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)
    return OpenAIGPTForSequenceClassification(config)


@pytest.mark.parametrize(
    ("model", "mode", "reason"),
    [
        (albert, "prefix", r"AlbertForSequenceClassification does not run with it \(\w+Error: .*\); give another mode"),
        (albert, "prefix+lora", r"AlbertForSequenceClassification does not run with it"),
        (openai_gpt, "prefix", r"OpenAIGPTForSequenceClassification silently ignores it; give another mode"),
    ],
)
def test_a_model_that_does_not_read_a_prefix_is_refused(model: Any, mode: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"--finetune_mode='{re.escape(mode)}': {reason}"):
        prepare_mode(model(), mode, lora_r=2, lora_target_modules=["query"])


@pytest.mark.parametrize("mode", ["prefix", "soft-prompt"])
def test_trying_a_prefix_out_changes_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [prepare_mode(bert(), mode)[0], torch.get_rng_state()]
    monkeypatch.setattr(finetune_modes, "_require_read", lambda *_: None)
    plain = [prepare_mode(bert(), mode)[0], torch.get_rng_state()]
    assert torch.equal(tried[1], plain[1])
    assert tried[0].training == plain[0].training
    for name, value in plain[0].state_dict().items():
        assert torch.equal(tried[0].state_dict()[name], value), name
