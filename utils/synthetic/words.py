"""Split texts into words for statistics, without case and punctuation. Each Chinese or Japanese character is a word."""

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
    """The words of `text`, case-folded, one per span of `word_spans`.

    >>> words_of("Straße, STRASSE 你好")
    ['strasse', 'strasse', '你', '好']
    """
    return [word.casefold() for word in _WORD.findall(text)]


def take_words(texts: Sequence[Sequence[str]], count: int, seed: int) -> list[list[str]]:
    """Texts in random order until they hold `count` words; the last one is cut.

    The number of different words, and of new ones, grows with the length of a sample. So samples are compared at an
    equal number of words.

    Args:
        texts: words of each text.
        count: number of words to take; at most as many as there are.
        seed: seed of the order.
    """
    taken: list[list[str]] = []
    missing = count
    for number in np.random.default_rng(seed).permutation(len(texts)):
        if missing <= 0:
            break
        taken.append(list(texts[number][:missing]))
        missing -= len(taken[-1])
    if missing > 0:
        raise RuntimeError(f"{count} words asked for, but the texts have {missing} fewer")
    return taken
