"""Plots are images in data URLs, and show what they should."""

from __future__ import annotations

import base64

import numpy as np

from utils.attacks.plots import plot_exposures, plot_roc, plot_scores


def svg(image: str) -> str:
    return base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode()


def test_the_curve_shows_the_limit_of_epsilon_if_there_is_one() -> None:
    generator = np.random.default_rng(0)
    members, others = ({"loss": generator.normal(size=50)} for _ in range(2))
    with_limit = plot_roc(members, others, ((1.0, 1e-5),))
    told = "<!-- most that epsilon allows -->"
    assert told in svg(with_limit)
    assert told not in svg(plot_roc(members, others, ()))


def test_scores_and_exposures_are_drawn() -> None:
    assert "<!-- held out -->" in svg(plot_scores(np.array([1.0, 2.0]), np.array([0.0, 1.0]), "nats"))
    assert "<!-- trained -->" in svg(plot_exposures([10.0], [1.0], 10.0))
