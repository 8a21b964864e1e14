"""What people typed is text, even if it spells a special token; what a prompt writes is not."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS, tiny_tokenizer
from tests.tokenizer_kinds import FAST, SLOW, ending_where_unknown
from utils.data.special_tokens import MarkedText, SpecialTokens, StandInLost, UnwrittenToken


def starting_tokenizer() -> PreTrainedTokenizerFast:
    """One that adds <s>, as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, rstrip=True), AddedToken("<|us", special=True)])
    return tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put in front of the first word of a text, and not after a special token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([*CORPUS, "</s> <s> b|"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


MAKERS = [tiny_tokenizer, starting_tokenizer, metaspace_tokenizer]


def marked(tokens: SpecialTokens, *parts: tuple[str, bool]) -> MarkedText:
    """A text of parts, each typed by a person or not."""
    return tokens.shown("".join(tokens.hidden(text) if typed else text for text, typed in parts))[0]


@pytest.mark.parametrize("make", MAKERS)
def test_typed_tokens_are_text_and_written_ones_are_not(make) -> None:
    tokenizer = make()
    tokens = SpecialTokens(tokenizer)
    one = marked(tokens, ("</s>Hello ", False), ("a </s>b<s>", True), ("</s> c", False))
    assert (one.text, one.typed) == ("</s>Hello a </s>b<s></s> c", ((12, 16), (17, 20)))
    ((ids, offsets),) = tokens.encoded([one])
    assert [place for number, place in zip(ids, offsets, strict=True) if number == tokenizer.eos_token_id] == [
        (0, 4),
        (20, 24),
    ]
    assert all(number != tokenizer.bos_token_id for number, (_, end) in zip(ids, offsets, strict=True) if end)
    assert tokenizer.decode(ids).replace("</s> ", "</s>").endswith(one.text.replace("</s> ", "</s>"))
    assert max(ids) < len(tokenizer)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("text", ["Hello, how</s> are you </s>\n", "<|user|>  The cat</s>", "</s></s>", " sat"])
def test_the_copy_of_the_tokenizer_gives_the_same_tokens_where_nothing_is_typed(make, text: str) -> None:
    """Oracle: the tokenizer itself, on a text whose only typed token stands at its end, behind a written one."""
    tokenizer = make()
    tokens = SpecialTokens(tokenizer)
    ((alone, places),) = tokens.encoded([MarkedText(text + "</s>")])
    ((ids, offsets),) = tokens.encoded([marked(tokens, (text + "</s>", False), ("<unk>", True))])
    assert ids[: len(alone)] == alone
    assert [tuple(place) for place in offsets[: len(places)]] == [tuple(place) for place in places]
    assert tokenizer.unk_token_id not in ids[len(alone) :]


@given(st.lists(st.tuples(st.sampled_from(["</s>", "<s>", "<", "/s>", " a ", "é", "\n"]), st.booleans()), max_size=8))
def test_offsets_and_ids_belong_to_the_text(parts: list[tuple[str, bool]]) -> None:
    """With bytes as tokens every character has its place; only written tokens are special."""
    tokenizer = tiny_tokenizer()
    tokens = SpecialTokens(tokenizer)
    one = marked(tokens, ("x", True), *parts)  # a second start token at the beginning would be dropped
    assert one.text == "x" + "".join(text for text, _ in parts)
    ((ids, offsets),) = tokens.encoded([one])
    typed = {position for start, end in one.typed for position in range(start, end)}
    for number, (start, end) in zip(ids, offsets, strict=True):
        if number in (1, 2):
            assert one.text[start:end] == tokenizer.convert_ids_to_tokens(number)
            assert not typed & set(range(start, end))
    assert tokenizer.decode(ids) == one.text


def test_positions_move_with_the_text() -> None:
    tokens = SpecialTokens(tiny_tokenizer())
    hidden = "ab" + tokens.hidden("c</s>d") + "e"
    shown, moved = tokens.shown(hidden, [0, 2, hidden.index("d"), len(hidden)])
    assert (shown.text, moved) == ("abc</s>de", [0, 2, 7, 9])


def test_the_longest_token_that_is_spelled_counts() -> None:
    tokens = SpecialTokens(starting_tokenizer())
    assert marked(tokens, ("<|user|><|us", True)).typed == ((0, 8), (8, 12))


def test_end_tokens_at_the_end_of_an_answer_are_its_end() -> None:
    tokens = SpecialTokens(tiny_tokenizer())
    for answer, typed in [("a</s>b</s> </s>\n", ((1, 5),)), ("a</s>", ()), ("</s>", ()), ("a</s>b", ((1, 5),))]:
        shown, _ = tokens.shown(tokens.hidden_answer(answer))
        assert shown == (answer, typed)


def test_a_stand_in_that_a_template_cuts_is_noticed() -> None:
    tokens = SpecialTokens(tiny_tokenizer())
    with pytest.raises(StandInLost):
        tokens.shown(tokens.hidden("a</s>b")[:-2])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("typed", [False, True])
def test_a_text_that_brings_the_start_token_gets_no_second_one(make, typed: bool) -> None:
    tokenizer = make()
    tokens = SpecialTokens(tokenizer)
    ((ids, _),) = tokens.encoded([marked(tokens, ("<s>Say.", False), ("<s>" if typed else "x", True))])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


SPELLINGS = ["</s>", "\uff1c/s\uff1e", "<s>", "[SEP]", "[sep]", "\uff3bSEP\uff3d", "<|image|>", "<tool>", "<", "/s>"]
TYPED = st.lists(st.sampled_from([*SPELLINGS, " ", "a", " b ", "\n"]), max_size=6).map("".join)
NAMES = ("<s>", "</s>", "[SEP]", "<|image|>")


@pytest.mark.parametrize("make", FAST)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.tuples(TYPED, st.just(True)), st.tuples(st.sampled_from(NAMES), st.just(False)))))
def test_only_written_tokens_are_special_whatever_the_model(make, parts: list[tuple[str, bool]]) -> None:
    """The special tokens are those written, in order, after the one that the tokenizer adds."""
    tokenizer = _made(make)
    tokens = SpecialTokens(tokenizer)
    known = [(text, typed) for text, typed in parts if typed or text in tokenizer.get_vocab()]
    runs = groupby([("a", True), *known], key=lambda part: part[1])  # what is typed in a row is one text
    one = marked(tokens, *(("".join(text for text, _ in run), typed) for typed, run in runs))
    ((ids, _),) = tokens.encoded([one])
    added = [number for number in tokenizer("")["input_ids"] if number is not None]
    written = [tokenizer.convert_tokens_to_ids(text) for text, typed in known if not typed]
    guarded = set(tokenizer.convert_tokens_to_ids([name for name in NAMES if name in tokenizer.get_vocab()]))
    assert [number for number in ids if number in guarded] == added + written


_MADE: dict[object, PreTrainedTokenizerFast] = {}


def _made(make) -> PreTrainedTokenizerFast:
    if make not in _MADE:
        _MADE[make] = make()
    return _MADE[make]


def test_a_text_whose_unknown_words_are_end_tokens_is_refused() -> None:
    tokens = SpecialTokens(ending_where_unknown())
    assert [ids for ids, _ in tokens.encoded([MarkedText("cat cat"), MarkedText("cat</s>")])] == [[1, 1], [1, 0]]
    with pytest.raises(UnwrittenToken, match="text 2"):
        list(tokens.encoded([MarkedText("cat"), MarkedText("cat dog")]))
    with pytest.raises(UnwrittenToken):
        list(tokens.encoded([marked(tokens, ("cat</s>", True))]))


@pytest.mark.parametrize("make", SLOW)
def test_a_tokenizer_without_offsets_refuses_typed_special_tokens(make, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    tokens = SpecialTokens(tokenizer)
    assert tokens.encoded_without_offsets(MarkedText("the cat</s>day")) == tokenizer("the cat</s>day")["input_ids"]
    for text in ("the cat", "\uff1c/s\uff1e"):
        one = marked(tokens, (text, True))
        assert tokens.count(tokens.encoded_without_offsets(one)) == tokens.count(tokenizer("")["input_ids"])
    with pytest.raises(UnwrittenToken):
        tokens.encoded_without_offsets(marked(tokens, ("the</s>day", True)))
