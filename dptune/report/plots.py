"""Plots: epsilon by step, which may be published, measurements on the data, which may not, and what an audit found.

The figures use matplotlib's objects and the Agg canvas, because pyplot keeps state for the whole process and looks for
a screen. The colours are those of Okabe and Ito, which people with any colour vision can tell apart.

matplotlib is loaded by the first plot, so that a run does not begin with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.accounting.rounding import rounded_up
from dptune.report.statement import PrivacyStatement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIAGNOSTICS_BANNER = "NOT PRIVATE - do not publish"

_BLUE, _VERMILION, _GREY, _RED = "#0072B2", "#D55E00", "#555555", "#B00020"
_MARKERS_UP_TO = 40  # points; with more, the line itself shows where they are
_DPI = 150
_BANNER_INCHES = 0.5

DiagnosticsRow = Mapping[str, float | None]


def plot_epsilon(
    path: str | os.PathLike[str], steps: Sequence[int], epsilons: Sequence[float], statement: PrivacyStatement
) -> None:
    """Draw epsilon by step as a PNG, with a line at the reported epsilon. It may be published.

    Args:
        path: the PNG to write.
        steps: numbers of noisy steps, ascending.
        epsilons: epsilon at `statement.delta` after each of `steps`; same length.
        statement: the run's statement, with a guarantee.

    Raises:
        InvalidArgument: there is no guarantee, or the two lengths differ.
    """
    if statement.epsilon is None:
        refuse("statement", statement.guarantee, "a run without a guarantee has no epsilon to plot")
    if len(steps) != len(epsilons):
        refuse("epsilons", len(epsilons), f"give one for each of the {len(steps)} steps")
    figure, (axes,) = _figure(1, width=7, height=4.2)
    axes.plot(steps, epsilons, color=_BLUE, linewidth=2, **_marker(len(steps)))
    axes.axhline(statement.epsilon, color=_VERMILION, linewidth=1.2, linestyle="--")
    number = statement.steps + statement.unused_steps
    label = f"reported: ε = {rounded_up(statement.epsilon, 3)} after {number:,} step" + "s" * (number != 1)
    axes.annotate(label, (0.02, statement.epsilon), xycoords=("axes fraction", "data"), xytext=(0, 5),
                  textcoords="offset points", color=_VERMILION, fontsize=10)  # fmt: skip
    axes.set_ylim(0, 1.15 * max(statement.epsilon, *epsilons, 1e-12))
    axes.set_xlim(left=0)
    axes.set_ylabel(f"ε at δ = {float(statement.delta or 0):.3g}")
    axes.set_title("Privacy loss by training step (lower is more private)", fontsize=12)
    axes.set_xlabel("Step")
    _save(figure, path)


def plot_diagnostics(
    path: str | os.PathLike[str],
    rows: Sequence[DiagnosticsRow],
    *,
    loss_unit: str = "nats per token",
) -> None:
    """Draw loss, gradient norms and clipped fraction by step as a PNG that says it is not private.

    A quantity that no row holds gets no panel, so a run without clipping shows only its losses. A value that is absent,
    None or not finite leaves a gap.

    Args:
        path: the PNG to write.
        rows: one mapping per line of `diagnostics.jsonl`. Each has "step" and any of "loss", "eval_loss" (in
            `loss_unit`), "grad_norm_p10", "grad_norm_p50", "grad_norm_p90" (over examples, before clipping),
            "clip_norm" (of the step) and "clipped_fraction" (0 to 1).
        loss_unit: unit of the losses.
    """
    panels = [(key, draw) for key, draw in _PANELS.items() if _has(rows, key)] or [("loss", _draw_loss)]
    figure, all_axes = _figure(len(panels), width=8, height=_BANNER_INCHES + 0.4 + 2.6 * len(panels))
    for axes, (key, draw) in zip(all_axes, panels, strict=True):
        draw(axes, rows)
        if key == "loss":
            axes.set_ylabel(f"Loss\n({loss_unit})")
    all_axes[-1].set_xlabel("Step")
    _mark_not_private(figure, all_axes)
    _save(figure, path)


def plot_bounds(
    path: str | os.PathLike[str], rows: Sequence[tuple[str, float, float]], *, delta: float, private: bool
) -> None:
    """Draw what an audit found beside what is stated, as a PNG: a bar and a line for each row.

    Args:
        path: the PNG to write.
        rows: (name, lower bound on epsilon, stated epsilon), at least one.
        delta: of all epsilons.
        private: whether the picture may be published. If not, it says so.
    """
    figure, (axes,) = _figure(1, width=8, height=1.6 + _BANNER_INCHES * (not private) + 0.45 * len(rows))
    places = np.arange(len(rows))[::-1]
    names, found, stated = zip(*rows, strict=True)
    colours = [_RED if low > high else _BLUE for low, high in zip(found, stated, strict=True)]
    axes.barh(places, found, height=0.5, color=colours, label="found, at least")
    axes.vlines(stated, places - 0.35, places + 0.35, color=_VERMILION, linewidth=2.5, label="stated, at most")
    axes.set_yticks(places, names, fontsize=9)
    axes.set_xlim(0, 1.1 * max(1e-6, *found, *stated))
    axes.set_xlabel(f"ε at δ = {delta:.3g}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9, frameon=False)
    if not private:
        _mark_not_private(figure, [axes])
    _save(figure, path)


def _draw_loss(axes: Axes, rows: Sequence[DiagnosticsRow]) -> None:
    _line(axes, rows, "loss", _BLUE, "training batch", linewidth=1.2)
    if _has(rows, "eval_loss"):
        _line(axes, rows, "eval_loss", _VERMILION, "held out", linewidth=2, marker="o", markersize=4)
    _legend(axes)


def _draw_norms(axes: Axes, rows: Sequence[DiagnosticsRow]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    steps, low = _column(rows, "grad_norm_p10")
    high = _column(rows, "grad_norm_p90")[1]
    axes.fill_between(steps, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="10% to 90% of examples")
    _line(axes, rows, "grad_norm_p50", _BLUE, "median", linewidth=1.5)
    if _has(rows, "clip_norm"):
        fixed = {row["clip_norm"] for row in rows if row.get("clip_norm") is not None}
        label = f"clip norm {fixed.pop():g}" if len(fixed) == 1 else "clip norm"
        _line(axes, rows, "clip_norm", _VERMILION, label, linewidth=1.5, linestyle="--", marker="")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("Gradient norm of an\nexample, before clipping")
    _legend(axes)


def _draw_clipped(axes: Axes, rows: Sequence[DiagnosticsRow]) -> None:
    from matplotlib.ticker import PercentFormatter

    _line(axes, rows, "clipped_fraction", _BLUE, "clipped", linewidth=1.2)
    axes.set_ylim(-0.04, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylabel("Examples clipped\n(% of the batch)")


_PANELS = {"loss": _draw_loss, "grad_norm_p50": _draw_norms, "clipped_fraction": _draw_clipped}


def _figure(panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` plots, one below the other, with a shared step axis; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=_GREY)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, all_axes


def _line(axes: Axes, rows: Sequence[DiagnosticsRow], key: str, color: str, label: str, **style: Any) -> None:
    """Draw the rows that have `key`; a value that is not finite interrupts the line."""
    steps, values = _column([row for row in rows if key in row], key)
    axes.plot(steps, values, color=color, label=label, **{**_marker(len(steps)), **style})


def _column(rows: Sequence[DiagnosticsRow], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of `key`, with NaN for missing values. matplotlib leaves a gap for NaN and infinity."""
    values = [np.nan if (value := row.get(key)) is None else value for row in rows]
    return np.array([row["step"] for row in rows]), np.array(values, dtype=float)


def _has(rows: Sequence[DiagnosticsRow], key: str) -> bool:
    return bool(np.isfinite(_column(rows, key)[1]).any())


def _marker(points: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if points <= _MARKERS_UP_TO else {}


def _legend(axes: Axes) -> None:
    """Put the legend in one row above the panel, where it covers no data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9, frameon=False, borderaxespad=0.1)


def _mark_not_private(figure: Figure, all_axes: Sequence[Axes]) -> None:
    """Put a banner over the figure, and a watermark in each panel that stays if someone cuts the panel out."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    top = 1 - _BANNER_INCHES / figure.get_figheight()
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, top)))
    figure.text(0.5, (1 + top) / 2, f"Training diagnostics: {DIAGNOSTICS_BANNER}", ha="center", va="center",
                color="white", fontsize=13, fontweight="bold",
                bbox={"facecolor": _RED, "edgecolor": "none", "boxstyle": "round,pad=0.4"})  # fmt: skip
    for axes in all_axes:
        axes.text(0.5, 0.5, "NOT PRIVATE", transform=axes.transAxes, ha="center", va="center", fontsize=34,
                  color=_RED, alpha=0.10, fontweight="bold", zorder=0)  # fmt: skip


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")
