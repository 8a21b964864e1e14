"""The plots of a comparison of synthetic with real text, as SVG images in data URLs.

An image in a data URL cannot run a script, whatever the name of a sample. Samples differ by colour and dashes; the
held-out sample is black.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.synthetic.arguments import HELD_OUT, UNTRAINED

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_INCHES = (4.8, 3.4)  # a phone's width at the page's letter size
_MOST_POINTS = 300


Line = tuple[np.ndarray, np.ndarray]  # x and y of its points


def plot_curves(curves: Mapping[str, np.ndarray]) -> str:
    """MAUVE's divergence curves, [points, 2] each."""
    lines = {name: (curve[:, 0], curve[:, 1]) for name, curve in curves.items()}
    labels = "little text unlike real text →", "little real text missed →"
    return _plot_lines(lines, labels, lambda axes: axes.set(xlim=(0, 1.02), ylim=(0, 1.02)))


def plot_ranks(curves: Mapping[str, np.ndarray]) -> str:
    """Word frequencies by rank, both logarithmic."""
    lines = {}
    for name, frequencies in curves.items():
        ranks = np.unique(np.geomspace(1, len(frequencies), _MOST_POINTS).astype(int))
        lines[name] = (ranks, frequencies[ranks - 1])
    labels = "rank of the word", "share of all words"
    return _plot_lines(lines, labels, lambda axes: axes.set(xscale="log", yscale="log"))


def plot_lengths(values: Mapping[str, np.ndarray], label: str) -> str:
    """Share of texts up to each length."""
    shares = np.linspace(0, 1, _MOST_POINTS)
    lines = {name: (np.maximum(np.quantile(lengths, shares), 1), shares) for name, lengths in values.items()}
    labels = label, "share of texts up to this length"
    return _plot_lines(lines, labels, lambda axes: axes.set(xscale="log", ylim=(0, 1.02)))


def plot_tails(values: Mapping[str, np.ndarray], label: str, *, logarithmic: bool) -> str:
    """Share of texts at least as near to a training row as x; `logarithmic` (for passages) applies to both axes."""
    lines = {name: tail(np.maximum(nearness, 1) if logarithmic else nearness) for name, nearness in values.items()}
    scale = "log" if logarithmic else "linear"
    labels = label, "share of texts with at least this"
    return _plot_lines(lines, labels, lambda axes: axes.set(xscale=scale, yscale=scale))


def tail(values: np.ndarray) -> Line:
    """Ascending points (all values, or evenly chosen ones) and the share of `values` that are at least each point."""
    shares = np.linspace(1, 1 / len(values), min(_MOST_POINTS, len(values)))
    return np.quantile(values, 1 - shares, method="higher"), shares


def plot_accuracies(results: Mapping[str, Mapping[str, float]]) -> str:
    """Next-token accuracy with error bars of two standard errors."""

    def draw(axes: Axes) -> None:
        names = list(results)
        places = range(len(names))[::-1]
        for place, name in zip(places, names, strict=True):
            result = results[name]
            color = "#999999" if name == UNTRAINED else _style(name, names)[0]
            error = 2 * result["accuracy_error"]
            axes.barh(place, result["accuracy"], xerr=error, color=color, height=0.6, capsize=3)
        axes.set_yticks(list(places), [_plain(name) for name in names])
        axes.set(xlabel="next-token accuracy", xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return drawn_image(draw, legend=False)


def _plot_lines(lines: Mapping[str, Line], labels: tuple[str, str], scale: Callable[[Axes], object]) -> str:
    """One line per sample, with `labels` on the two axes."""

    def draw(axes: Axes) -> None:
        for name, (x, y) in lines.items():
            color, dashes, width = _style(name, list(lines))
            axes.plot(x, y, color=color, linestyle=dashes, linewidth=width, label=_plain(name))
        scale(axes)
        axes.set(xlabel=labels[0], ylabel=labels[1])

    return drawn_image(draw)


def drawn_image(draw: Callable[[Axes], None], *, legend: bool = True) -> str:
    """What `draw` puts on new axes, as a data URL."""
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


def _style(name: str, names: Sequence[str]) -> tuple[str, str, float]:
    """Colour, dashes and width of one sample's line."""
    if name == HELD_OUT:
        return "black", "-", 1.2
    number = [other for other in names if other != HELD_OUT].index(name)
    return _COLORS[number % len(_COLORS)], _DASHES[number % len(_DASHES)], 1.8


def _plain(name: str) -> str:
    """The name with dollar signs escaped: matplotlib reads text between them as mathematics."""
    return name.replace("$", r"\$")
