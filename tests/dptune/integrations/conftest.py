"""Fixtures of the tests of the Trainer and the callback."""

from __future__ import annotations

import pytest


@pytest.fixture
def with_plots() -> None:
    """Plots are drawn."""


@pytest.fixture(autouse=True)
def plots_only_where_asked(request: pytest.FixtureRequest) -> None:
    """Every run ends with a plot, which takes longer than the rest of a tiny run."""
    if "with_plots" not in request.fixturenames:
        request.getfixturevalue("no_plots")
