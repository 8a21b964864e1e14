"""The plot of a plan: noise over signal by training time, for each of several batches, one panel per epsilon."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dptune._files import atomic_write
from dptune.accounting.data_needed import USUAL_EPSILONS
from dptune.accounting.rounding import rounded_up
from dptune.run.noise_ratios import noise_over_signal
from utils.planning.proposal import Proposal
from utils.planning.search import Limits, quietest

_TIMES = (0.25, 0.5, 1, 2, 4)  # of the given time
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, which people with any colour vision can tell
_MARKERS = ("o", "s", "^", "D")
_PANEL_INCHES, _DPI = (4.2, 4.0), 150


def plot_trade(path: str | os.PathLike[str], proposal: Proposal, epsilons: Sequence[float] = USUAL_EPSILONS) -> None:
    """Draw it as a PNG. Of the data it knows the number alone.

    Args:
        path: the PNG to write.
        proposal: the proposal; batches next to the proposed one are drawn.
        epsilons: one panel each.
    """
    limits, trained = proposal.limits, proposal.trained
    batches = [int(one.expected_batch_size) for one in proposal.around(len(_COLORS))]
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(epsilons), height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(1, len(epsilons), sharey=True, squeeze=False)[0])
    for axes, epsilon in zip(panels, epsilons, strict=True):
        _draw(axes, limits, batches, epsilon, trained)
    panels[0].set_ylabel("Noise over signal of all steps")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def points(limits: Limits, batch: int, epsilon: float, trained: int) -> tuple[list[float], list[float]]:
    """(hours, noise over signal) of a batch, for several times; those without time for a step, or that no useful noise
    suits, are left out. A line ends with the most steps of `limits`."""
    hours, noise = [], []
    for share in _TIMES:
        timed = replace(limits, seconds=share * limits.seconds)
        config = quietest(timed, batch, epsilon) if timed.steps(batch) else None
        if config is not None:
            hours.append(timed.hours(config))
            noise.append(noise_over_signal(config, trained))
    return hours, noise


def _draw(axes: Axes, limits: Limits, batches: Sequence[int], epsilon: float, trained: int) -> None:
    for batch, color, marker in zip(batches, _COLORS, _MARKERS, strict=False):
        axes.plot(
            *points(limits, batch, epsilon, trained), color=color, marker=marker, markersize=4, label=f"batch {batch:,}"
        )
    axes.axvline(limits.seconds / 3600, color="#555555", linewidth=1, linestyle="--", label="the proposed time")
    axes.set(xscale="log", yscale="log", xlabel="Hours of training", title=f"ε = {rounded_up(epsilon, trim=True)}")
    axes.set_xticks([share * limits.seconds / 3600 for share in _TIMES])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=10))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
