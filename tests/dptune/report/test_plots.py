"""The plots decode, show what they are given, and the private one can't be made from a run without a guarantee."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from dptune._validate import InvalidArgument
from dptune.report import plots
from dptune.report.plots import DIAGNOSTICS_BANNER, plot_bounds, plot_diagnostics, plot_epsilon
from tests.dptune.report.test_statement import not_private, private

BLUE, VERMILION, RED = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xB0, 0x00, 0x20)


def test_a_run_that_does_not_plot_does_not_load_matplotlib() -> None:
    """It takes a quarter of a second before the first step."""
    code = "import sys, dptune.report.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def _rows(count: int = 30) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.5}]
    for step in range(1, count + 1):
        norms = {"grad_norm_p10": 0.4, "grad_norm_p50": 1.0 + step / 50, "grad_norm_p90": 4.0}
        rows.append({"step": step, "loss": 3.4 - step / 50, **norms, "clipped_fraction": 0.5})
    return rows


def _pixels(path: Path, color: tuple[int, int, int]) -> int:
    image = (imread(path)[..., :3] * 255).round().astype(int)
    return int((np.abs(image - np.array(color)).max(axis=-1) <= 6).sum())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved during a test."""
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def _texts(figure: Figure) -> list[str]:
    legends = [legend for axes in figure.axes if (legend := axes.get_legend())]
    own = [text.get_text() for texts in (figure.texts, *(axes.texts for axes in figure.axes)) for text in texts]
    return own + [text.get_text() for legend in legends for text in legend.get_texts()]


def test_epsilon_decodes_and_shows_the_curve_and_the_reported_value(tmp_path: Path, drawn: list[Figure]) -> None:
    steps = list(range(1, 185))
    curve = [2.25712345 * np.sqrt(step / 184) for step in steps]
    plot_epsilon(tmp_path / "epsilon.png", steps, curve, private())
    assert _pixels(tmp_path / "epsilon.png", BLUE) > 500
    assert _pixels(tmp_path / "epsilon.png", VERMILION) > 500
    (axes,) = drawn[0].axes
    assert axes.get_lines()[0].get_xydata() == pytest.approx(np.column_stack([steps, curve]))
    assert any("2.258" in text and "184 steps" in text for text in _texts(drawn[0]))
    assert "1e-07" in axes.get_ylabel()
    assert [p.name for p in tmp_path.iterdir()] == ["epsilon.png"]


def test_without_a_guarantee_there_is_no_epsilon_to_plot(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^statement='none': a run without a guarantee"):
        plot_epsilon(tmp_path / "epsilon.png", [1], [0.5], not_private())
    with pytest.raises(InvalidArgument, match=r"^epsilons=2: give one for each of the 1 steps"):
        plot_epsilon(tmp_path / "epsilon.png", [1], [0.5, 0.6], private())
    assert list(tmp_path.iterdir()) == []


def test_diagnostics_decode_and_are_marked(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_diagnostics(tmp_path / "diagnostics.png", [row | {"clip_norm": 1.0} for row in _rows()])
    assert _pixels(tmp_path / "diagnostics.png", RED) > 20_000, "the banner"
    assert _pixels(tmp_path / "diagnostics.png", BLUE) > 1000
    texts = _texts(drawn[0])
    assert any(DIAGNOSTICS_BANNER in text for text in texts)
    assert texts.count("NOT PRIVATE") == len(drawn[0].axes) == 3
    assert {"training batch", "held out", "median", "10% to 90% of examples", "clip norm 1"} <= set(texts)


def test_the_clip_norm_is_a_line_at_its_value(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_diagnostics(tmp_path / "d.png", [row | {"clip_norm": 0.7} for row in _rows()])
    lines = {str(line.get_label()): line for line in drawn[0].axes[1].get_lines()}
    assert set(np.asarray(lines["clip norm 0.7"].get_ydata())) == {0.7}


def test_what_was_not_measured_has_no_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_diagnostics(tmp_path / "d.png", [{"step": step, "loss": 2.0} for step in range(5)])
    assert len(drawn[0].axes) == 1
    assert "held out" not in _texts(drawn[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": None}],
        [{"step": 1, "loss": 2.0, "grad_norm_p10": 0.0, "grad_norm_p50": 0.0, "grad_norm_p90": 1.0}],
        [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf")}, {"step": 3, "loss": 1.0}],
        [{"step": i, "grad_norm_p10": 0.5, "grad_norm_p50": v, "grad_norm_p90": v} for i, v in ((1, 1.0), (2, np.inf))],
        [{"step": 1, "eval_loss": 2.0}],
    ],
)
def test_gaps_and_odd_values_draw_without_a_warning(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_diagnostics(tmp_path / "d.png", rows)
    assert _pixels(tmp_path / "d.png", RED) > 10_000


def test_an_empty_draw_interrupts_the_line(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_diagnostics(
        tmp_path / "d.png", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    )
    values = np.asarray(drawn[0].axes[0].get_lines()[0].get_ydata(), dtype=float)
    assert np.isnan(values).tolist() == [False, True, False]


def test_pyplot_and_its_global_state_stay_out(tmp_path: Path) -> None:
    code = (
        "import sys; from dptune.report.plots import plot_diagnostics\n"
        "plot_diagnostics(sys.argv[1], [{'step': 1, 'loss': 2.0}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d.png")], cwd=root, check=True)
    assert _pixels(tmp_path / "d.png", RED) > 10_000


@pytest.mark.parametrize("private", [True, False])
def test_bounds_show_found_beside_stated_and_what_is_contradicted(
    private: bool, tmp_path: Path, drawn: list[Figure]
) -> None:
    plot_bounds(tmp_path / "b.png", [("one step", 5.0, 4.0), ("ten", 1.0, 6.0)], delta=1e-5, private=private)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one step", "ten"]
    assert [bar.get_width() for bar in axes.patches] == [5.0, 1.0]
    assert _pixels(tmp_path / "b.png", BLUE) > 1000
    assert _pixels(tmp_path / "b.png", RED) > 1000
    assert any(DIAGNOSTICS_BANNER in text for text in _texts(drawn[0])) != private
