"""The notebooks run from the first cell to the last, on a tiny model and rows that are made here."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("accelerate_configs", "data", "dptune", "scripts", "utils")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def workplace(folder: Path) -> Path:
    """A folder that looks like the repository, so that what a notebook writes stays out of the real one."""
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in FOLDERS)]:
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = workplace(tmp_path)
    rows = [{"instruction": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(200)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setenv("DPTUNE_MODEL", str(save_tiny(folder / "model")))
    monkeypatch.setenv("DPTUNE_DATA", "rows.jsonl")
    # The tiny model ends about one text in seven, and the notebook needs five different ones.
    monkeypatch.setenv("DPTUNE_TEXTS", "300")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    shown = json.dumps(notebook.cells)
    assert "epsilon" in shown
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count is None]


def test_the_notebooks_hold_no_output() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code" and cell["outputs"]] == []
