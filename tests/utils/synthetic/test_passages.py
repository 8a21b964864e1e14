"""The longest shared passage against difflib, text by text."""

from __future__ import annotations

import difflib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.synthetic.passages import SharedPassage, longest_shared_passages

NOTHING = SharedPassage(0, 0, -1)
FEW_WORDS = st.lists(st.sampled_from("abc"), max_size=12)


def longest(text: list[str], rows: list[list[str]]) -> int:
    """Words in the longest passage that a text shares with a row, by difflib."""
    matchers = (difflib.SequenceMatcher(None, text, row, autojunk=False) for row in rows)
    return max((matcher.find_longest_match().size for matcher in matchers), default=0)


def stands_there(text: list[str], rows: list[list[str]], found: SharedPassage) -> bool:
    """Whether the passage of the text is in the row that is named; for no passage, whether none is named."""
    if not found.length:
        return found == NOTHING
    passage = text[found.start : found.start + found.length]
    row = rows[found.row]
    return any(row[start : start + found.length] == passage for start in range(len(row)))


@given(st.lists(FEW_WORDS, max_size=5), st.lists(FEW_WORDS, min_size=1, max_size=5))
def test_it_is_the_longest(rows: list[list[str]], texts: list[list[str]]) -> None:
    passages = longest_shared_passages(texts, rows)
    assert [found.length for found in passages] == [longest(text, rows) for text in texts]
    assert all(stands_there(text, rows, found) for text, found in zip(texts, passages, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_long_texts_and_copies_too(seed: int) -> None:
    rng = random.Random(seed)
    rows = [rng.choices("abcdefgh", k=rng.randint(1, 150)) for _ in range(20)]
    spliced = rng.choices("xyz", k=7) + rows[0][3:] + rng.choices("xyz", k=5)
    texts = [rows[1], spliced, rows[2] + rows[3], rng.choices("abcdefgh", k=100), ["z"]]
    passages = longest_shared_passages(texts, rows)
    assert [found.length for found in passages] == [longest(text, rows) for text in texts]
    assert all(stands_there(text, rows, found) for text, found in zip(texts, passages, strict=True))


def test_a_passage_never_spans_two_rows_nor_matches_another_text() -> None:
    rows = [["a", "b"], ["c", "d"]]
    texts = [["a", "b", "c", "d"], ["x", "y", "z"], ["x", "y", "z"]]
    assert [found.length for found in longest_shared_passages(texts, rows)] == [2, 0, 0]


def test_nothing_is_shared_with_no_rows_or_without_words() -> None:
    assert longest_shared_passages([["a"], []], []) == [NOTHING, NOTHING]
    assert longest_shared_passages([[]], [["a"], []]) == [NOTHING]
    assert longest_shared_passages([], [["a"]]) == []
