"""Tiny random checkpoints of an encoder and a decoder with their tokenizer, and an easy task in GLUE's layout."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
FILLERS = ["the", "a", "film", "plot", "of", "and", "was", "its", "story", "actor", "very", "this"]
GOOD, BAD = ["good", "fine", "lovely"], ["bad", "dull", "awful"]
WORDS = [*SPECIAL, *FILLERS, *GOOD, *BAD]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def word_tokenizer(*, encoder: bool) -> PreTrainedTokenizerFast:
    """One token per word; an encoder's tokenizer has BERT's special tokens, a decoder's only an end token."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if not encoder:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_bert(folder: Path, **changed: Any) -> Path:
    """A BERT without a classification head, with dropout."""
    torch.manual_seed(0)
    BertModel(BertConfig(**(SIZES | changed))).save_pretrained(folder)
    word_tokenizer(encoder=True).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A Llama without a classification head and without a pad token."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, eos_token_id=4)).save_pretrained(folder)
    word_tokenizer(encoder=False).save_pretrained(folder)
    return folder


def write_sst2(folder: Path, *, train: int = 120, held_out: int = 33) -> Path:
    """`folder`/SST-2 in GLUE's layout: a sentence is positive if it has good words, negative if it has bad ones."""
    target = folder / "SST-2"
    target.mkdir(parents=True)
    for name, count in (("train", train), ("dev", held_out)):
        chance = random.Random(name)
        lines = ["sentence\tlabel"]
        for number in range(count):
            words = [*chance.choices(FILLERS, k=chance.randint(0, 3)), *chance.choices((BAD, GOOD)[number % 2], k=2)]
            chance.shuffle(words)
            lines.append(f"{' '.join(words)}\t{number % 2}")
        (target / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_qnli(folder: Path, *, train: int = 60, held_out: int = 9) -> Path:
    """`folder`/QNLI in GLUE's layout: a question and a sentence."""
    target = folder / "QNLI"
    target.mkdir(parents=True)
    for name, count in (("train", train), ("dev", held_out)):
        lines = [
            f"{number}\twas the {GOOD[number % 3]}\tthe film\t{('not_' * (number % 2))}entailment"
            for number in range(count)
        ]
        (target / f"{name}.tsv").write_text("\n".join(["index\tquestion\tsentence\tlabel", *lines]) + "\n")
    return folder
