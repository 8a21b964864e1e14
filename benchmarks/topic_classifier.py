"""Train a topic classifier on synthetic text and test it on real text.

It is a logistic regression on TF-IDF of words and pairs of words. It uses no pre-trained embeddings, so all it knows
about topics comes from its training texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline

_RESAMPLES = 1000
_INVERSE_REGULARISATION = 10.0
_ITERATIONS = 1000


@dataclass(frozen=True)
class Labelled:
    """Texts, each with a topic."""

    texts: Sequence[str]
    topics: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.topics):
            raise RuntimeError(f"{len(self.topics)} topics for {len(self.texts)} texts")

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, count: int, seed: int) -> Labelled:
        """A random selection of `count` texts, or all if there are fewer."""
        chosen = np.random.default_rng(seed).permutation(len(self))[:count]
        return Labelled([self.texts[i] for i in chosen], [self.topics[i] for i in chosen])


@dataclass(frozen=True)
class Score:
    """Scores on the test texts. `error` is the standard error of the accuracy, from a bootstrap over texts."""

    accuracy: float
    error: float
    macro_f1: float


def majority(test: Labelled) -> float:
    """Accuracy of always predicting the majority topic of the test texts."""
    return max(np.unique(np.asarray(test.topics), return_counts=True)[1]) / len(test)


def train_and_test(train: Labelled, test: Labelled, *, seed: int = 0) -> Score:
    """Fit only on `train`, including the vocabulary; score on `test`."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=_ITERATIONS),
    ).fit(train.texts, train.topics)
    named = model.predict(test.texts)
    right = named == np.asarray(test.topics)
    drawn = np.random.default_rng(seed).integers(len(right), size=(_RESAMPLES, len(right)))
    return Score(
        accuracy=float(right.mean()),
        error=float(right[drawn].mean(axis=1).std(ddof=1)),
        macro_f1=float(f1_score(test.topics, named, average="macro", zero_division=0)),
    )
