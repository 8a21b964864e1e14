"""The plots of a comparison of synthetic with real text, as SVG images in data addresses.

An image in a data address can run no script, whatever a sample is named. Samples differ by colour and by dashes; the
held-out one is black.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.synthetic.arguments import HELD_OUT, UNTRAINED

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_INCHES = (4.8, 3.4)  # a phone's width at the page's letter size
_MOST_POINTS = 300


def plot_curves(curves: Mapping[str, np.ndarray]) -> str:
    """MAUVE's divergence curves, [points, 2] each."""

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            axes.plot(curve[:, 0], curve[:, 1], **_style(name, list(curves)))
        axes.set(xlabel="little text unlike real text →", ylabel="little real text missed →")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))

    return _image(draw)


def plot_ranks(curves: Mapping[str, np.ndarray]) -> str:
    """Word frequencies by rank, both logarithmic."""

    def draw(axes: Axes) -> None:
        for name, frequencies in curves.items():
            ranks = np.unique(np.geomspace(1, len(frequencies), _MOST_POINTS).astype(int))
            axes.loglog(ranks, frequencies[ranks - 1], **_style(name, list(curves)))
        axes.set(xlabel="rank of the word", ylabel="share of all words")

    return _image(draw)


def plot_lengths(values: Mapping[str, np.ndarray], label: str) -> str:
    """Share of texts at most so long."""

    def draw(axes: Axes) -> None:
        for name, lengths in values.items():
            points = np.quantile(lengths, np.linspace(0, 1, _MOST_POINTS))
            axes.plot(np.maximum(points, 1), np.linspace(0, 1, _MOST_POINTS), **_style(name, list(values)))
        axes.set_xscale("log")
        axes.set(xlabel=label, ylabel="share of texts at most so long", ylim=(0, 1.02))

    return _image(draw)


def plot_tails(values: Mapping[str, np.ndarray], label: str, *, logarithmic: bool) -> str:
    """Share of texts at least so near to a training row; `logarithmic` has both axes so, for passages."""

    def draw(axes: Axes) -> None:
        for name, nearness in values.items():
            points, shares = tail(nearness)
            axes.plot(np.maximum(points, 1) if logarithmic else points, shares, **_style(name, list(values)))
        if logarithmic:
            axes.set(xscale="log", yscale="log")
        axes.set(xlabel=label, ylabel="share of texts with at least that")

    return _image(draw)


def tail(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of a tail, ascending, and the share of `values` that are at least each of them: all of them, or an even
    choice."""
    shares = np.linspace(1, 1 / len(values), min(_MOST_POINTS, len(values)))
    return np.quantile(values, 1 - shares, method="higher"), shares


def plot_accuracies(results: Mapping[str, Mapping[str, float]]) -> str:
    """Next-token accuracy with two standard errors."""

    def draw(axes: Axes) -> None:
        names = list(results)
        places = range(len(names))[::-1]
        for place, name in zip(places, names, strict=True):
            result = results[name]
            color = "#999999" if name == UNTRAINED else _style(name, names)["color"]
            error = 2 * result["accuracy_error"]
            axes.barh(place, result["accuracy"], xerr=error, color=color, height=0.6, capsize=3)
        axes.set_yticks(list(places), [_plain(name) for name in names])
        axes.set(xlabel="next-token accuracy", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return _image(draw, legend=False)


def _image(draw: Callable[[Axes], None], *, legend: bool = True) -> str:
    """What `draw` puts on fresh axes, as a data address."""
    figure = Figure(figsize=_INCHES, layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    draw(axes)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dptune"}):  # the same numbers give the same file
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour, dashes and legend entry of one sample."""
    label = _plain(name)
    if name == HELD_OUT:
        return {"color": "black", "linestyle": "-", "linewidth": 1.2, "label": label}
    number = [other for other in names if other != HELD_OUT].index(name)
    dashes = _DASHES[number % len(_DASHES)]
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": dashes, "linewidth": 1.8, "label": label}


def _plain(name: str) -> str:
    """Without meaning for matplotlib, which reads what stands between dollar signs as mathematics."""
    return name.replace("$", r"\$")
