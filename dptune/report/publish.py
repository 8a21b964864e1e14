"""Everything that may be published with the trained weights: the report, the plot of epsilon and the model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dptune.accounting import Spend, compose
from dptune.report.card import Artifact, write_model_card
from dptune.report.plots import plot_epsilon
from dptune.report.statement import REPORT_NAME, PrivacyStatement, write_privacy_report

EPSILON_PLOT = "epsilon.png"
CARD_NAME = "README.md"

_CURVE_POINTS = 20


def publish(folder: Path, statement: PrivacyStatement, *, base_model: str, artifact: Artifact) -> None:
    """Write the report, the plot and the card to `folder`, which must exist. A run without a guarantee gets no plot.

    Args:
        folder: where the files go.
        statement: the run's guarantee; nothing else about the run enters the files.
        base_model, artifact: see `write_model_card`.
    """
    write_privacy_report(folder / REPORT_NAME, statement)
    plot = EPSILON_PLOT if _plot_curve(folder / EPSILON_PLOT, statement) else None
    write_model_card(folder / CARD_NAME, statement, base_model=base_model, epsilon_plot=plot, artifact=artifact)


def _plot_curve(path: Path, statement: PrivacyStatement) -> bool:
    """Draw epsilon by step, if the run has one. Returns whether it has."""
    sigma, delta = statement.noise_multiplier, statement.delta
    if statement.epsilon is None or sigma is None or delta is None:
        return False
    steps = sorted({round(step) for step in np.linspace(1, statement.steps + statement.unused_steps, _CURVE_POINTS)})
    q, group_size = statement.sampling_probability, statement.group_size
    epsilons = [compose([Spend(sigma, q, step, group_size)], delta=delta) for step in steps]
    plot_epsilon(path, steps, epsilons, statement)
    return True
