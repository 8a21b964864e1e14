"""A Llama of a few thousand parameters and its tokenizer, made on the fly, so that tests download nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "Abstract: The patients were given a placebo and their blood pressure was measured twice a day.",
    "Abstract: We report a randomised trial of two treatments in adults with a chronic disease.",
    "Describe a process of making crepes. Mix flour, eggs and milk, then fry the batter in a pan.",
    "Hello, how are you today? I am fine, thank you, and you?",
    "The cat sat on the mat. A dog ran over the hill to see the sun go down.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with <s>, </s>, no pad token (as Llama 2 has none) and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(
    seed: int = 0, *, vocab_size: int = 400, hidden: int = 32, layers: int = 2, tie: bool = False
) -> LlamaForCausalLM:
    """A random float32 Llama with grouped-query attention, in evaluation mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, **kwargs: int) -> Path:
    """Write model and tokenizer to `folder` for `from_pretrained`."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), **kwargs).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_pair_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words (CORPUS and `words`), with [CLS] and [SEP] around one or two texts, like BERT's."""
    texts = [*CORPUS, *words]
    known = sorted({word for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: number for number, token in enumerate([*special, *known])}
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    level.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
