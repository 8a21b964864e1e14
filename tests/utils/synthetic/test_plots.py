"""The same numbers give the same plot, and a tail is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from utils.synthetic.arguments import UNTRAINED
from utils.synthetic.plots import plot_accuracies, tail

EVIL = '<script>alert("$x$")</script>'


def test_the_same_numbers_give_the_same_plot() -> None:
    results = {UNTRAINED: {"accuracy": 0.1, "accuracy_error": 0.01}}
    assert plot_accuracies(results) == plot_accuracies(results)


def test_a_tail_says_how_many_texts_have_at_least_so_much() -> None:
    points, parts = tail(np.array([3.0, 1.0, 4.0, 2.0]))
    assert points.tolist() == [1, 2, 3, 4]
    assert parts.tolist() == [1, 0.75, 0.5, 0.25]
    values = np.random.default_rng(0).normal(size=1000)
    points, parts = tail(values)
    assert len(points) == 300
    assert parts == pytest.approx([np.mean(values >= point) for point in points], abs=1 / 1000)
    assert points[-1] == values.max()
