"""The plot has a panel for each data set; filled markers are private runs, hollow ones are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.comparison_runs import accuracy
from tests.trainer_stand_in import PARAMETERS, Trainer
from utils.comparison import plot
from utils.comparison.outcomes import Outcome


def outcome(folder: Path, mode: str, *, private: bool) -> Outcome:
    """What the stand-in for a training left."""
    flags = {"output_dir": str(folder / f"{mode}-{private}"), "datasets": "sst2", "finetune_mode": mode, "seed": "0"}
    rate = "1e-3" if private else "1e-4"
    flags |= {"learning_rate": rate, "batch_size": "100", "num_train_epochs": "1"} | (
        {"enable_dp": ""} if private else {}
    )
    Trainer(accuracy).leave(flags)
    left = Path(flags["output_dir"]) / "sst2"
    return Outcome.of(json.loads((left / "results.json").read_text()), left / "ledger.jsonl")


def test_markers_stand_at_size_and_accuracy_and_are_filled_with_privacy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plot, "FigureCanvasAgg", drawn.append)
    outcomes = [outcome(tmp_path, mode, private=private) for mode in ("full", "lora") for private in (True, False)]
    plot.plot_modes(tmp_path / "plot.png", {"sst2": outcomes[:3], "other": outcomes[3:]})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == ["sst2", "other"]
    points = {
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() != "white")
        for line in panels[0].lines
        if line.get_marker() not in ("None", "_")
    }
    full, lora = PARAMETERS["full"], PARAMETERS["lora"]
    assert {(x, round(float(y), 6), filled) for x, y, filled in points} == {
        (full, 0.8, True), (full, 0.9, False), (lora, 0.76, True),
    }  # fmt: skip
