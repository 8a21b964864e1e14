"""The picture of a run takes each curve from the rows that have it, and is a PNG."""

from __future__ import annotations

from pathlib import Path

from benchmarks.run_plot import curve, draw

ROWS = [{"step": 0, "eval_loss": 4.2}, {"step": 1, "epsilon": 3.0}, {"step": 2, "epsilon": 3.5, "eval_loss": 4.0}]


def test_a_curve_has_the_steps_that_were_measured() -> None:
    assert curve(ROWS, "eval_loss") == ([0, 2], [4.2, 4.0])
    assert curve(ROWS, "epsilon") == ([1, 2], [3.0, 3.5])


def test_the_picture_is_a_small_png(tmp_path: Path) -> None:
    draw(ROWS, {"epsilon": 3.5, "delta": 1e-4}, tmp_path / "run.png")
    content = (tmp_path / "run.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 200_000
