"""Runs `scripts/compare_modes.py` in this process with a stand-in for the trainings, and reads its output."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune.accounting.selection import DrawnTrial, PrivateSelection
from scripts import compare_modes
from tests.trainer_stand_in import TRAIN, VALIDATION, Ran, Trainer

MODES = ["--modes", "full", "lora", "last-layer"]
FLAGS = [
    *MODES,
    "--learning_rates",
    "1e-4",
    "1e-3",
    "--batch_size",
    "100",
    "--num_train_epochs",
    "2",
    "--model_name_or_path",
    "m",
]
STEPS, Q = 20, 0.1


def accuracy(ran: Ran) -> float:
    """Private runs score better with the high rate, the others with the low one; later seeds score a little better."""
    private = ran.clip_norm is not None
    good = ran.rate == (1e-3 if private else 1e-4)
    best = {"full": 0.9, "lora": 0.86, "last-layer": 0.7}[ran.mode]
    return best - 0.1 * private - 0.05 * (not good) + 0.01 * ran.seed


def compare(folder: Path, *flags: str, trainer: Trainer | None = None) -> Trainer:
    trainer = trainer or Trainer(accuracy)
    compare_modes.main([*FLAGS, "--output_dir", str(folder), *flags], runner=trainer)
    return trainer


def table(folder: Path) -> dict[str, list[str]]:
    """The rows of the first table by mode."""
    lines = (folder / "comparison.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if row[0] in ("full", "lora", "last-layer")}


def best_of_all(folder: Path) -> tuple[str, float]:
    """(number of runs, their epsilon) in the report."""
    lines = (folder / "comparison.md").read_text().splitlines()
    (cells,) = (line.strip("| ").split("|") for line in lines if "the best of all runs" in line)
    return cells[0].partition("(")[2].partition(")")[0], float(cells[1])


def select(folder: Path, *flags: str, trainer: Trainer | None = None, name: str = "geometric") -> Trainer:
    trainer = trainer or Trainer(accuracy)
    line = [*FLAGS, "--output_dir", str(folder), "--private_selection", name, "--mean_trials", "4", *flags]
    compare_modes.main(line, runner=trainer, sizes=lambda *_: (TRAIN, VALIDATION))
    return trainer


def draw(monkeypatch: pytest.MonkeyPatch, *trials: tuple[int, float]) -> None:
    """Make the next draws these (candidate, noise)."""
    drawn = [DrawnTrial(*trial) for trial in trials]
    monkeypatch.setattr(PrivateSelection, "draw_trials", lambda *_: drawn)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
