"""The longest passage that a text shares with any of many other texts, found exactly by a suffix array over all.

Suffixes are sorted by prefix doubling (Manber and Myers 1993), which gives a rank to each run of 1, 2, 4, ... words:
equal ranks mean equal runs. The longest match of a suffix is with the nearest one before or after it in sorted order
that belongs to the searched rows. For N words and texts of L words it takes O(N log N log L) time and 4 N log L bytes.
Two million words take seven seconds on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SharedPassage:
    """The longest run of words that a text shares with a row.

    Attributes:
        length: in words; 0 if no word is shared.
        start: where it begins in the text, in words.
        row: one of the rows that contain it; -1 if there is none.
    """

    length: int
    start: int
    row: int


def longest_shared_passages(texts: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> list[SharedPassage]:
    """For each text the longest run of consecutive words that some row contains too.

    Args:
        texts: words of each text.
        rows: words of each row.
    """
    all_texts = [*rows, *texts]
    words, owner = _concatenate(all_texts)
    ranks = _ranks_of_runs(words, longest=max(map(len, texts), default=0))
    length, position = _best_matches(ranks, owner < len(rows))
    starts = np.cumsum([0, *(len(text) + 1 for text in all_texts)])
    found = []
    for number in range(len(rows), len(all_texts)):
        here = length[starts[number] : starts[number + 1] - 1]
        best = int(here.argmax()) if len(here) and here.max() > 0 else -1
        row = int(owner[position[starts[number] + best]]) if best >= 0 else -1
        found.append(SharedPassage(int(here[best]) if best >= 0 else 0, max(best, 0), row))
    return found


def _concatenate(texts: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Word numbers of all texts, int64 [N], and the text of each; every text ends with a number that no other has."""
    numbers: dict[str, int] = {}
    words = [
        number
        for index, text in enumerate(texts)
        for number in (*(len(texts) + numbers.setdefault(word, len(numbers)) for word in text), index)
    ]
    lengths = [len(text) + 1 for text in texts]
    return np.array(words, dtype=np.int64), np.repeat(np.arange(len(texts)), lengths)


def _ranks_of_runs(words: np.ndarray, longest: int) -> list[np.ndarray]:
    """Ranks of the runs of 1, 2, 4, ... words at each position, int32 [N] each, until runs exceed `longest`.

    Runs of one length have the same rank if and only if they are equal, and ranks are in lexicographical order.
    """
    ranks = [_dense(words)]
    while (width := 2 ** (len(ranks) - 1)) <= longest and ranks[-1].max() < len(words) - 1:
        behind = np.zeros(len(words), dtype=np.int64)  # past the end: what is before has the last text's own end in it
        behind[:-width] = ranks[-1][width:]
        ranks.append(_dense(ranks[-1].astype(np.int64) * len(words) + behind))
    return ranks


def _dense(keys: np.ndarray) -> np.ndarray:
    return np.unique(keys, return_inverse=True)[1].astype(np.int32)


def _best_matches(ranks: Sequence[np.ndarray], is_row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length of each position's longest match with a position of the rows, and that position."""
    order = np.argsort(ranks[-1], kind="stable")
    place = np.arange(len(order))
    before = np.maximum.accumulate(np.where(is_row[order], place, -1))
    behind = np.minimum.accumulate(np.where(is_row[order], place, len(order))[::-1])[::-1]
    best_length = np.zeros(len(order), dtype=np.int64)
    best_position = np.zeros(len(order), dtype=np.int64)
    for neighbour in (before, behind):
        exists = (neighbour >= 0) & (neighbour < len(order)) & ~is_row[order]
        here, there = order[exists], order[neighbour[exists]]
        length = _common_lengths(ranks, here, there)
        longer = length > best_length[here]
        best_length[here[longer]], best_position[here[longer]] = length[longer], there[longer]
    return best_length, best_position


def _common_lengths(ranks: Sequence[np.ndarray], ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How many words from `ours` on equal those from `theirs` on, pair by pair; tests the largest runs first."""
    size = len(ranks[0])
    length = np.zeros(len(ours), dtype=np.int64)
    for level in reversed(range(len(ranks))):
        one, other = ours + length, theirs + length
        inside = (one < size) & (other < size)
        equal = ranks[level][np.where(inside, one, 0)] == ranks[level][np.where(inside, other, 0)]
        length += np.where(inside & equal, 2**level, 0)
    return length
