"""Texts as words, for statistics: without case and punctuation; each Chinese or Japanese character is a word."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # written without spaces between words
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word in characters of `text`.

    >>> word_spans("It's 3!")
    [(0, 2), (3, 4), (5, 6)]
    """
    return [match.span() for match in _WORD.finditer(text)]


def words_of(text: str) -> list[str]:
    """The words of `text`, as many as `word_spans` gives, case-folded.

    >>> words_of("Straße, STRASSE 你好")
    ['strasse', 'strasse', '你', '好']
    """
    return [word.casefold() for word in _WORD.findall(text)]


def take_words(texts: Sequence[Sequence[str]], count: int, seed: int) -> list[list[str]]:
    """Texts in random order until they hold `count` words; the last one is cut.

    How many different words a text has, and how many are new, grows with its length, so samples are compared at one
    number of words.

    Args:
        texts: words of each text.
        count: how many to take; at most as many as there are.
        seed: of the order.
    """
    taken: list[list[str]] = []
    missing = count
    for number in np.random.default_rng(seed).permutation(len(texts)):
        if missing <= 0:
            break
        taken.append(list(texts[number][:missing]))
        missing -= len(taken[-1])
    if missing > 0:
        raise RuntimeError(f"{count} words asked for, {missing} fewer are there")
    return taken
