"""Accuracy, F1 and the majority class, against counts made by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from utils.classification.metrics import majority, metric_scores


def test_accuracy_and_f1_against_counts() -> None:
    """3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    labels = np.array([1] * 5 + [0] * 5)
    predictions = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    assert metric_scores(labels, predictions, ("accuracy", "f1")) == pytest.approx({"accuracy": 0.7, "f1": 6 / 9})
    assert list(metric_scores(labels, predictions, ("f1", "accuracy"))) == ["f1", "accuracy"]
    assert type(metric_scores(labels, predictions, ("accuracy",))["accuracy"]) is float


def test_the_positive_class_is_1() -> None:
    assert metric_scores([0, 0, 0, 1], [0, 0, 0, 0], ("f1",)) == {"f1": 0.0}
    assert metric_scores([1, 1, 1, 0], [1, 1, 1, 1], ("f1",)) == pytest.approx({"f1": 6 / 7})


def test_f1_where_nobody_says_1_is_0_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric_scores([0, 0], [0, 0], ("accuracy", "f1")) == {"accuracy": 1.0, "f1": 0.0}


def test_accuracy_of_three_classes() -> None:
    assert metric_scores([0, 1, 2, 2], [0, 2, 2, 1], ("accuracy",)) == {"accuracy": 0.5}


def test_majority() -> None:
    assert majority(np.array([2, 0, 2, 1], dtype=np.int64)) == 0.5
    assert majority([1]) == 1.0


@pytest.mark.parametrize(("labels", "predictions"), [([], []), ([0, 1], [0])])
def test_every_row_needs_a_prediction(labels: list[int], predictions: list[int]) -> None:
    with pytest.raises(ValueError, match="predictions for"):
        metric_scores(labels, predictions, ("accuracy",))
