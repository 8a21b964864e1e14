"""Passages that a model's texts share with training rows, compared with those that they share with held-out rows.

Any two texts share some words. So the texts are searched for in as many held-out rows as training rows: a model that
copies shares longer passages with the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.synthetic.passages import longest_shared_passages
from utils.synthetic.words import words_of

SURE_CHANCE = 0.001  # below, a difference is no chance
LONG = 20  # words from which a single passage counts, as in scripts/evaluate_synthetic.py


@dataclass(frozen=True)
class Copied:
    """What some texts share with rows.

    Attributes:
        rows: number of training rows that were searched, and of held-out rows.
        train, held_out: the longest passage of each text in words, int64 [texts], shared with any row of each kind.
    """

    rows: int
    train: np.ndarray
    held_out: np.ndarray

    @property
    def longer(self) -> int:
        """Number of texts whose passage is longer with the training rows."""
        return int((self.train > self.held_out).sum())

    @property
    def shorter(self) -> int:
        """Number of texts whose passage is longer with the held-out rows."""
        return int((self.train < self.held_out).sum())

    @property
    def chance(self) -> float:
        """The chance of so many longer ones if training rows were no nearer than held-out rows (sign test)."""
        from scipy.stats import binomtest

        differ = self.longer + self.shorter
        return float(binomtest(self.longer, differ, alternative="greater").pvalue) if differ else 1.0

    @property
    def long(self) -> int:
        """Number of texts that share LONG words or more with a training row, and more than any with a held-out row."""
        return int((self.train >= max(LONG, self.held_out.max() + 1)).sum())

    @property
    def copies(self) -> bool:
        """Whether the texts are nearer to the training rows than chance explains, or any of them copies a lot."""
        return self.chance < SURE_CHANCE or self.long > 0


def compare_copies(texts: Sequence[str], train: Sequence[str], held_out: Sequence[str]) -> Copied:
    """Search texts for the longest passages that they share with rows.

    Args:
        texts: at least one.
        train, held_out: equally many rows.
    """
    if len(train) != len(held_out):
        raise RuntimeError(f"{len(train)} training rows and {len(held_out)} held-out rows are no fair comparison")
    words = [words_of(text) for text in texts]
    found = [longest_shared_passages(words, [words_of(row) for row in rows]) for rows in (train, held_out)]
    lengths = [np.array([one.length for one in passages], dtype=np.int64) for passages in found]
    return Copied(len(train), *lengths)
