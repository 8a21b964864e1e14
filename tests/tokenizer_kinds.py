"""One tokenizer of each kind of model, whose vocabulary holds the names of its special tokens, as real ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from tests.tiny import CORPUS, tiny_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "[SEP]"]
LETTERS = ["a", "b", "c", "x", "s", "<", "/", ">", "[", "]", "E", "P", "S"]
ADDED_BETWEEN = "<|image|>"  # a special token beyond the vocabulary, before a token of text that must keep its id


def _wrapped(tokenizer: Tokenizer, *, normalized: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, normalized=normalized, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(ADDED_BETWEEN, special=True), AddedToken("<tool>", special=False)])
    number = tokenizer.token_to_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A [SEP] $B:1",
        special_tokens=[(name, number(name)) for name in ("<s>", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", sep_token="[SEP]"
    )


def unigram(*, lower: bool = False) -> PreTrainedTokenizerFast:
    """As T5, XLM-R, mBART, ALBERT and XLNet: NFKC, and special tokens as pieces that score best."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(f"\u2581{letter}", -5.0) for letter in LETTERS]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("\u2581", -4.0), *((one, -6.0) for one in LETTERS)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *[normalizers.Lowercase()] * lower])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _wrapped(tokenizer, normalized=lower)


def lowercase_unigram() -> PreTrainedTokenizerFast:
    """As ALBERT's in lower case, with special tokens that are looked for in the normalized text."""
    return unigram(lower=True)


def _words() -> dict[str, int]:
    return {word: number for number, word in enumerate([*SPECIAL, "cat", *LETTERS])}


def word_level() -> PreTrainedTokenizerFast:
    """Words between white space, among them the special tokens."""
    tokenizer = Tokenizer(models.WordLevel(_words(), unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's, but words end at white space only."""
    words = _words() | {f"##{letter}": 100 + number for number, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer)


def merging_bpe() -> PreTrainedTokenizerFast:
    """Merges that make a special token of its characters."""
    parts = ["</", "s>", "</s>", "<s>", "[S", "EP", "EP]", "[SEP]"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>"), ("[", "S"), ("E", "P"), ("EP", "]"), ("[S", "EP]")]
    words = dict.fromkeys([*SPECIAL, "\u2581", *LETTERS, *parts])
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrapped(tokenizer)


def whole_word_bpe() -> PreTrainedTokenizerFast:
    """As Llama 3's: a word that the vocabulary holds is not merged."""
    words = dict.fromkeys([*SPECIAL, *LETTERS])
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer)


def ending_where_unknown() -> PreTrainedTokenizerFast:
    """Its unknown token is its end token: no text with an unknown word can be encoded."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "cat": 1}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="</s>", eos_token="</s>")


def trained_unigram() -> PreTrainedTokenizerFast:
    """A Unigram model made by the trainer, which gives special tokens the best score."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*CORPUS * 4, "</s> <s> [ ] S E P a b c x"], trainer)
    tokenizer.decoder = decoders.Metaspace()
    return _wrapped(tokenizer)


FAST: list[Callable[[], PreTrainedTokenizerFast]] = [
    tiny_tokenizer,
    unigram,
    lowercase_unigram,
    trained_unigram,
    word_level,
    word_piece,
    merging_bpe,
    whole_word_bpe,
]


def slow_bytes(_: Path) -> PreTrainedTokenizer:
    """A tokenizer in Python, without a model."""
    return ByT5Tokenizer()


def slow_pieces(folder: Path) -> PreTrainedTokenizer:
    """A tokenizer of the sentencepiece library, which has `</s>` as a control symbol."""
    import sentencepiece
    from transformers import SpeechT5Tokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_prefix=str(folder / "m"), vocab_size=60, minloglevel=2
    )
    return SpeechT5Tokenizer(str(folder / "m.model"))


SLOW: list[Callable[[Path], PreTrainedTokenizer]] = [slow_bytes, slow_pieces]
