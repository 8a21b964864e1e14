"""A head that starts from label words: a decoder's classes are its own next words, an encoder prefers the
most similar description, and words that mean nothing to the model are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from dptune import InvalidArgument
from dptune.integrations.peft import class_logits
from tests.classifier_folders import SIZES, WORDS, save_bert, save_llama, word_tokenizer
from tests.tiny import save_tiny, tiny_tokenizer
from utils.classification.dataset import tokenize_texts
from utils.classification.files import load_classifier, load_classifier_tokenizer
from utils.classification.label_words import describe_head, is_decoder, start_head, suffix_tokens, word_tokens
from utils.classification.labelled_texts import LabelledTexts
from utils.classification.modes import prepare_mode

TEXTS = ["the film was very dull", "a story", "this actor and this plot"]
NAMES = ("negative", "mixed", "positive")
SUFFIX = " this film was"


def save_tied_llama(folder: Path) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, eos_token_id=4, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(encoder=False).save_pretrained(folder)
    return folder


def save_gpt2(folder: Path) -> Path:
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": len(WORDS), "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=4, eos_token_id=4)).save_pretrained(folder)
    word_tokenizer(encoder=False).save_pretrained(folder)
    return folder


def save_roberta(folder: Path) -> Path:
    torch.manual_seed(1)
    RobertaModel(RobertaConfig(**SIZES, pad_token_id=0, initializer_range=0.4)).save_pretrained(folder)
    word_tokenizer(encoder=True).save_pretrained(folder)
    return folder


DECODERS = {"Llama": save_llama, "tied Llama": save_tied_llama, "GPT-2": save_gpt2}
ENCODERS = {"BERT": partial(save_bert, initializer_range=0.4), "RoBERTa": save_roberta}  # lively: texts differ


def load(folder: Path) -> tuple[Any, Any]:
    tokenizer = load_classifier_tokenizer(str(folder))
    torch.manual_seed(0)
    return load_classifier(str(folder), NAMES, pad_token_id=tokenizer.pad_token_id)[0], tokenizer


def inputs_of(tokenizer: Any, texts: list[str], suffix: str | None = None) -> dict[str, Tensor]:
    data = tokenize_texts(LabelledTexts((texts,), torch.zeros(len(texts)).long().numpy()), tokenizer, 32,
                          suffix_tokens(tokenizer, suffix))  # fmt: skip
    batch = data.batch(range(len(texts)), tokenizer.pad_token_id)
    del batch["labels"]
    return batch


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found = class_logits(model.eval(), inputs)
    return found - found.mean(1, keepdim=True)


def states_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the head of a decoder reads, [B, D]."""
    seen: list[Tensor] = []
    handle = model.score.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    logits(model, inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("suffix", [None, SUFFIX])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_prefers_the_class_whose_word_it_would_write_next(
    name: str, suffix: str | None, tmp_path: Path
) -> None:
    folder, words = DECODERS[name](tmp_path), ("bad", "very", "good")
    model, tokenizer = load(folder)
    start_head(model, words, tokenizer, suffix=suffix, name=str(folder))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [*TEXTS, ""]
    inputs = inputs_of(tokenizer, texts, suffix)
    with torch.no_grad():
        next_words = torch.stack([
            whole(input_ids=row[None, :length]).logits[0, -1]
            for row, length in zip(inputs["input_ids"], inputs["attention_mask"].sum(1), strict=True)
        ])  # fmt: skip
    assert tokenizer.decode(inputs["input_ids"][1]).startswith(f"a story{suffix or ''}")
    wanted = next_words[:, tokenizer.convert_tokens_to_ids(list(words))]
    wanted = wanted - wanted.mean(1, keepdim=True)
    assert wanted[-1].abs().max() > 1e-4
    # What prefers a class after an empty text is taken off, by as much as a text's state is like that one's.
    states = states_of(model, inputs)
    likeness = states @ states[-1] / states[-1].square().sum()
    wanted = wanted - torch.outer(likeness, wanted[-1])
    assert wanted[:-1].abs().max() > 1e-3
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_prefers_the_description_that_is_most_like_a_text(name: str, tmp_path: Path) -> None:
    folder, texts = ENCODERS[name](tmp_path), ["a bad film", "a very film", "this good story"]
    model, tokenizer = load(folder)
    start_head(model, texts, tokenizer, suffix=None, name=str(folder))
    last = model.classifier.out_proj if name == "RoBERTa" else model.classifier
    seen: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    found = [logits(model, inputs_of(tokenizer, some)).double() for some in (texts, TEXTS, [""])]
    prototypes, states, empty = seen
    torch.testing.assert_close(found[2], torch.zeros(1, 3).double(), rtol=0, atol=1e-5)
    own = found[0]
    others = (own.sum(1) - own.diag()) / 2
    assert float((own.diag() - others).mean()) == pytest.approx(1, rel=1e-3)
    alike = (states - empty) @ (prototypes - prototypes.mean(0)).T
    scale = float(last.weight.norm() / (prototypes - prototypes.mean(0)).norm())
    torch.testing.assert_close(found[1], scale * alike, rtol=1e-3, atol=1e-4)


def test_the_start_is_the_same_whatever_the_seed_and_reads_no_random_head(tmp_path: Path) -> None:
    folder, found = save_bert(tmp_path), []
    for seed in (0, 1):
        model, tokenizer = load(folder)
        torch.manual_seed(seed)
        model.classifier.weight.data.normal_()
        model.classifier.bias.data.normal_()
        start_head(model, ("bad", "very", "good"), tokenizer, suffix=None, name=str(folder))
        found.append(model.classifier.weight.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", ["lora", "ia3", "last-layer"])
def test_a_mode_keeps_the_start(mode: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    model, tokenizer = load(folder)
    start_head(model, ("bad", "very", "good"), tokenizer, suffix=None, name=str(folder))
    inputs = inputs_of(tokenizer, TEXTS)
    before = logits(model, inputs)
    moded, _ = prepare_mode(model, mode, lora_r=2)
    torch.testing.assert_close(logits(moded, inputs), before)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("bad", "very good", "good"), "--label_words='very good': is 2 tokens for this model; give a word that is a"),
        (("bad", "tremendous", "good"), "--label_words='tremendous': is not in this model's vocabulary"),
        (("bad", "good ", "good"), "--label_words='good': is the same token as good ; give each class its own"),
    ],
)
def test_words_that_are_not_one_token_each_are_refused(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    model, tokenizer = load(folder := save_llama(tmp_path))
    before = model.score.weight.clone()
    with pytest.raises(InvalidArgument, match=f"^{told}"):
        start_head(model, words, tokenizer, suffix=None, name=str(folder))
    assert torch.equal(model.score.weight, before)


def test_a_word_is_read_with_the_space_that_stands_before_it() -> None:
    """In a byte-level vocabulary, a word inside a text is another token than at its beginning."""
    tokenizer = tiny_tokenizer()
    word = next(token for token in tokenizer.get_vocab() if token.startswith("Ġ") and len(token) > 2)[1:]
    assert word_tokens(tokenizer, [word], " It was") == [tokenizer.convert_tokens_to_ids(f"Ġ{word}")]
    assert word_tokens(tokenizer, ["d"], ":\n") == [tokenizer.convert_tokens_to_ids("d")]
    assert tokenizer.decode(suffix_tokens(tokenizer, " It was")) == " It was"
    assert suffix_tokens(tokenizer, None) == []


def test_a_suffix_that_a_tokenizer_cannot_put_last_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^--prompt_suffix=' was': the tokenizer ends every text with a special"):
        suffix_tokens(word_tokenizer(encoder=True), " was")
    with pytest.raises(InvalidArgument, match=r"^--prompt_suffix='ctor': its tokens depend on the text before it"):
        suffix_tokens(word_tokenizer(encoder=False), "ctor")


def test_descriptions_that_the_model_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    """Three words that it does not know are three times the same text."""
    model, tokenizer = load(folder := save_bert(tmp_path))
    with pytest.raises(InvalidArgument, match=r"^--label_words='x, y, z': the model can hardly tell them apart"):
        start_head(model, ("x", "y", "z"), tokenizer, suffix=None, name=str(folder))


def test_heads_without_a_layer_for_it_are_refused(tmp_path: Path) -> None:
    model, tokenizer = load(folder := save_llama(tmp_path))
    model.base_model.save_pretrained(tmp_path / "backbone")
    for name in (str(tmp_path / "backbone"), str(tmp_path / "nothing")):
        with pytest.raises(InvalidArgument, match="no output layer"):
            start_head(model, ("bad", "very", "good"), tokenizer, suffix=None, name=name)
    del folder
    encoder, tokenizer = load(save_bert(tmp_path / "bert"))
    encoder.classifier = torch.nn.Identity()
    encoder.classifier.weight = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidArgument, match="BertForSequenceClassification does not end with a linear layer"):
        start_head(encoder, ("bad", "very", "good"), tokenizer, suffix=None, name="x")


def test_the_line_says_which_class_has_which_word(tmp_path: Path) -> None:
    told = describe_head(("bad", "good"), ("negative", "positive"), decoder=True)
    assert told == "head starts from       output embeddings (negative: bad; positive: good)"
    assert "encoded descriptions" in describe_head(("a", "b"), ("x", "y"), decoder=False)
    assert is_decoder(load(save_tiny(tmp_path))[0])
