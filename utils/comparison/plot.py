"""Accuracy against trained parameters, one panel per data set. Filled markers are private runs, hollow ones are not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import count

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dptune._files import atomic_write
from utils.comparison.outcomes import METRIC, Outcome, mode_rows

# Okabe and Ito's colours, which people with any colour vision can tell apart. Markers show the mode too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_PANEL_INCHES, _LEGEND_INCHES, _DPI = (5.2, 4.4), 2.0, 150


def plot_modes(path: str | os.PathLike[str], by_dataset: Mapping[str, Sequence[Outcome]]) -> None:
    """Plot the best settings of each mode as a PNG; a thin line joins the private and the plain run.

    Args:
        path: the PNG to write.
        by_dataset: outcomes by data set, at least one each.
    """
    width, height = _PANEL_INCHES
    size = (width * len(by_dataset) + _LEGEND_INCHES, height)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    modes = list(dict.fromkeys(one.mode for outcomes in by_dataset.values() for one in outcomes))
    for axes, (dataset, outcomes) in zip(
        figure.subplots(1, len(by_dataset), squeeze=False)[0], by_dataset.items(), strict=True
    ):
        _draw(axes, dataset, outcomes, modes)
    figure.legend(handles=_legend(modes), loc="outside right center", frameon=False, fontsize=9)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def _draw(axes: Axes, dataset: str, outcomes: Sequence[Outcome], modes: Sequence[str]) -> None:
    for row in mode_rows(outcomes):
        color, marker = _style(modes.index(row.mode))
        points = [
            (best.accuracy, best.spread, fill) for best, fill in ((row.private, color), (row.plain, "white")) if best
        ]
        axes.plot([row.trained_parameters] * len(points), [point[0] for point in points], color=color, linewidth=0.8)
        for accuracy, spread, fill in points:
            axes.errorbar(
                row.trained_parameters, accuracy, yerr=spread, color=color, marker=marker, markersize=8,
                markerfacecolor=fill, markeredgewidth=1.5, linestyle="none", capsize=3, zorder=3,
            )  # fmt: skip
    axes.axhline(outcomes[0].majority, color="#555555", linewidth=1, linestyle="--")
    axes.annotate("majority class", (0.99, outcomes[0].majority), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", ha="right", fontsize=8, color="#555555")  # fmt: skip
    axes.set_xscale("log")
    axes.set_title(dataset, fontsize=12)
    axes.set_xlabel("Trained parameters")
    axes.set_ylabel(f"{METRIC.capitalize()} ({outcomes[0].split})")
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _style(number: int) -> tuple[str, str]:
    return _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]


def _legend(modes: Sequence[str]) -> list[Line2D]:
    """The modes, then the meaning of filled and hollow markers."""
    entries = [(mode, color, marker, color) for mode, (color, marker) in zip(modes, map(_style, count()), strict=False)]
    entries += [("private", "#555555", "o", "#555555"), ("without privacy", "#555555", "o", "white")]
    return [
        Line2D([], [], label=label, color=color, marker=marker, markerfacecolor=fill, linestyle="none", markersize=7)
        for label, color, marker, fill in entries
    ]
