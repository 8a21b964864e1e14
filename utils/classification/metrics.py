"""Metrics of a classifier: scikit-learn's, by the names that tasks use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score

Labels = Sequence[int] | np.ndarray


def _f1_of_class_1(labels: Labels, predictions: Labels) -> float:
    """F1 for two classes, where 1 is the positive one; 0 if 1 is neither a label nor a prediction."""
    return f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0.0)


_METRICS: dict[str, Callable[[Labels, Labels], float]] = {"accuracy": accuracy_score, "f1": _f1_of_class_1}


def metric_scores(labels: Labels, predictions: Labels, metrics: Sequence[str]) -> dict[str, float]:
    """Each metric over all rows of a split, in [0, 1], in the order asked for.

    Args:
        labels: the true class of each of N rows, N at least 1.
        predictions: the predicted class, [N].
        metrics: any of "accuracy" and "f1" (two classes; class 1 is the positive one, a duplicate in QQP).

    >>> metric_scores([0, 1, 1, 0], [0, 1, 0, 0], ("accuracy", "f1"))
    {'accuracy': 0.75, 'f1': 0.6666666666666666}
    """
    if not len(labels) == len(predictions) > 0:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    return {name: float(_METRICS[name](labels, predictions)) for name in metrics}


def majority(labels: Labels) -> float:
    """The accuracy of always predicting the majority class of these N rows, N at least 1.

    >>> majority([2, 0, 2, 1])
    0.5
    """
    return float(np.bincount(labels).max() / len(labels))
