"""No special token comes out of a text, whatever it spells and whatever model the tokenizer has."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer_kinds import FAST, SLOW, ending_where_unknown
from utils.data.special_tokens import SpecialTokens, UnwrittenToken
from utils.data.text_only import TextOnly

SPELLINGS = ["</s>", "\uff1c/s\uff1e", "<s>", "[SEP]", "[sep]", "\uff3bSEP\uff3d", "<|image|>", "<tool>"]
TEXT = st.lists(st.sampled_from([*SPELLINGS, " ", "a", " b ", "\n"]), max_size=6).map("".join)
MADE = [(TextOnly(tokenizer), tokenizer) for tokenizer in (make() for make in FAST)]
NAMES = [make.__name__ for make in FAST]


@pytest.mark.parametrize("made", MADE, ids=NAMES)
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_the_special_tokens_are_those_around_the_texts(made, rows: list[tuple[str, str]]) -> None:
    encode, tokenizer = made
    special = SpecialTokens(tokenizer)
    for columns in ([[a for a, _ in rows]], [[a for a, _ in rows], [b for _, b in rows]]):
        around = special.count(tokenizer(*[[""] for _ in columns])["input_ids"][0])
        for ids in encode(*columns)["input_ids"]:
            assert special.count(ids) == around
        cut = encode(*columns, truncation="longest_first", max_length=6)["input_ids"]
        assert [special.count(ids) for ids in cut] == [around] * len(rows)


@pytest.mark.parametrize("made", MADE, ids=NAMES)
def test_other_texts_are_encoded_as_by_the_tokenizer(made) -> None:
    _, tokenizer = made
    tokenizer.truncation_side = "left"
    how = {"truncation": "longest_first", "max_length": 8, "return_attention_mask": False}
    for columns in ([["a b c", "x < / s"]], [["a b c", "x < / s"], ["a", "b b b b b b"]]):
        assert TextOnly(tokenizer)(*columns, **how) == tokenizer(*columns, **how)
    tokenizer.truncation_side = "right"


@pytest.mark.parametrize("make", SLOW)
def test_slow_tokenizers_too(make, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    special = SpecialTokens(tokenizer)
    for ids in TextOnly(tokenizer)(["a</s>b", "\uff1c/s\uff1e", "the </s>", "</s>"])["input_ids"]:
        assert special.count(ids) == special.count(tokenizer("")["input_ids"])


def test_a_text_whose_unknown_words_are_end_tokens_is_refused() -> None:
    with pytest.raises(UnwrittenToken, match="text 2"):
        TextOnly(ending_where_unknown())(["cat", "cat dog"])
