"""Words and samples of equally many of them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.synthetic.words import take_words, word_spans, words_of


def test_case_and_punctuation_fall_away_and_a_chinese_character_is_a_word() -> None:
    assert words_of("Don't PANIC! 3.5% – Straße_1") == ["don", "t", "panic", "3", "5", "strasse_1"]
    assert words_of("你好world こん") == ["你", "好", "world", "こ", "ん"]
    assert words_of(" …\n") == []


@given(st.text())
def test_spans_are_those_of_the_words(text: str) -> None:
    assert [text[start:end].casefold() for start, end in word_spans(text)] == words_of(text)


def test_a_sample_has_the_words_asked_for_and_cuts_its_last_text_alone() -> None:
    texts = [["a"] * 3, ["b"] * 4, ["c"] * 5]
    for count in range(1, 13):
        taken = take_words(texts, count, seed=count)
        assert sum(map(len, taken)) == count
        assert all(list(text) in texts for text in taken[:-1])
        assert any(taken[-1] == text[: len(taken[-1])] for text in texts)


def test_which_texts_are_taken_depends_on_the_seed() -> None:
    texts = [[str(number)] for number in range(20)]
    drawn = Counter(text[0] for seed in range(300) for text in take_words(texts, 5, seed))
    assert len(drawn) == 20
    assert max(drawn.values()) < 3 * min(drawn.values())
    assert take_words(texts, 5, seed=1) == take_words(texts, 5, seed=1)


def test_more_words_than_there_are_is_our_own_mistake() -> None:
    with pytest.raises(RuntimeError, match="4 words asked for, but the texts have 1 fewer"):
        take_words([["a"] * 3], 4, seed=0)
