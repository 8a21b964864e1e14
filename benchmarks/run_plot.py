"""Epsilon and held-out loss of one run, by step, in one picture.

    python -m benchmarks.run_plot --run out --output docs/images/first_run.png

The held-out loss is measured on the data and not covered by epsilon: publish the picture only if that is acceptable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dptune.accounting.rounding import rounded_up
from dptune.published import PUBLISH_NAME
from dptune.report.statement import REPORT_NAME
from utils.training.log import DIAGNOSTICS_NAME, read_diagnostics

_BLUE, _VERMILION = "#0072B2", "#D55E00"

Curve = tuple[list[int], list[float]]  # steps, values


def curve(rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Steps and values of the rows that have one."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any], output: Path) -> None:
    """Two panels with one axis of steps.

    Args:
        rows: of the run's diagnostics.
        report: its privacy report, of a private run.
        output: the PNG to write.
    """
    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(*curve(rows, "eval_loss"), color=_VERMILION, marker="o", linewidth=2)
    left.set_title("Held-out loss (nats per token)", fontsize=11)
    right.plot(*curve(rows, "epsilon"), color=_BLUE, marker="o", markersize=3, linewidth=2)
    right.axhline(report["epsilon"], color="#555555", linewidth=1, linestyle="--")
    right.set_title(f"Privacy spent: ε = {rounded_up(report['epsilon'], 2)} at δ = {report['delta']:g}", fontsize=11)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(output, format="png")


def main() -> None:
    """Read a run's folder and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="Folder of a private run with held-out data")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    given = parser.parse_args()
    report = json.loads((given.run / PUBLISH_NAME / REPORT_NAME).read_text(encoding="utf-8"))
    draw(read_diagnostics(given.run / DIAGNOSTICS_NAME), report, given.output)


if __name__ == "__main__":
    main()
