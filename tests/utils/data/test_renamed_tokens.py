"""A copy with other names for special tokens keeps every id, and gives other texts the same tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tiny import CORPUS
from tests.tokenizer_kinds import FAST
from utils.data.renamed_tokens import with_renamed

NEW = {name: f"\ue000{number}\ue001" for number, name in enumerate(["<unk>", "<s>", "</s>", "[SEP]", "<|image|>"])}
MADE = [make() for make in FAST]


@pytest.mark.parametrize("tokenizer", MADE, ids=[make.__name__ for make in FAST])
def test_names_change_and_ids_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    old = tokenizer.get_vocab()
    names = {name: new for name, new in NEW.items() if name in old}
    copy = with_renamed(tokenizer.backend_tokenizer, names)
    assert copy.get_vocab() == {names.get(name, name): number for name, number in old.items()}
    assert tokenizer.get_vocab() == old
    for name, new in names.items():
        assert copy.encode(f"a{new}b", add_special_tokens=False).ids.count(old[name]) == 1
        assert not {old[name]} & {*copy.encode(f"a{name} {name}", add_special_tokens=False).ids} - {old["<unk>"]}


@pytest.mark.parametrize("tokenizer", MADE, ids=[make.__name__ for make in FAST])
@settings(max_examples=30, deadline=None)
@given(text=st.one_of(st.sampled_from(CORPUS), st.text(alphabet="abcxs </>[SEP]\n\u00e9", max_size=20)))
def test_other_texts_have_the_same_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    names = {name: new for name, new in NEW.items() if name in tokenizer.get_vocab()}
    copy = with_renamed(tokenizer.backend_tokenizer, names)
    if not any(name.lower() in text.lower() for name in names):
        assert copy.encode(text).ids == tokenizer.backend_tokenizer.encode(text).ids


def test_cutting_and_padding_are_left_behind() -> None:
    tokenizer = FAST[0]()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    copy = with_renamed(tokenizer.backend_tokenizer, {"</s>": "\ue000"})
    assert (copy.truncation, copy.padding) == (None, None)


def test_an_ordinary_piece_can_get_another_name() -> None:
    """An end token that is a word of the vocabulary, and not marked as special."""
    tokenizer = FAST[0]()
    number = tokenizer.get_vocab()["The"]
    copy = with_renamed(tokenizer.backend_tokenizer, {"The": "\ue000"})
    assert number not in copy.encode("The cat").ids
    assert copy.encode("a\ue000").ids[-1] == number
