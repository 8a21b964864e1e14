"""Trials: each is one training by `train_classifier.py`, in its own process and folder.

A finished trial has a `results.json` and is not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from dptune._validate import refuse

TRAINER = Path(__file__).resolve().parents[2] / "train_classifier.py"

Runner = Callable[[Sequence[str], Path], int]  # (command line, log file) -> exit status


class TrialResults(TypedDict):
    """The part of `results.json` that a comparison reads; `scores` are by split and metric."""

    task: str
    mode: str
    private: bool
    epsilon: float | None
    delta: float | None
    clip_norm: float | None
    learning_rate: float
    trained_parameters: int
    steps: int
    train_examples: int
    scores: dict[str, dict[str, float]]
    majority: dict[str, float]
    seed: int


@dataclass(frozen=True)
class Candidate:
    """A mode with a learning rate and, with privacy, a clip norm (None: measured by the training)."""

    mode: str
    learning_rate: float
    clip_norm: float | None = None

    def __str__(self) -> str:
        """The name of the trial's folder."""
        clip_norm = "" if self.clip_norm is None else f"_clip{self.clip_norm!r}"
        return f"{self.mode}_lr{self.learning_rate!r}{clip_norm}"

    @property
    def flags(self) -> list[str]:
        """The flags of train_classifier.py."""
        flags = ["--finetune_mode", self.mode, "--learning_rate", repr(self.learning_rate)]
        return flags if self.clip_norm is None else [*flags, "--clip_norm", repr(self.clip_norm)]


def run_in_process(command: Sequence[str], log: Path) -> int:
    """Run a command line and append its output to `log`."""
    with log.open("ab") as file:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False)
    return run.returncode


def run_trial(dataset: str, folder: Path, flags: Sequence[str], runner: Runner) -> TrialResults:
    """The results of a training on `dataset`, which is run unless its results exist.

    Args:
        dataset: one name for --datasets.
        folder: this trial's folder; its log is beside it.
        flags: all other flags.
        runner: `run_in_process`, or a stand-in for tests.

    Raises:
        InvalidArgument: the training failed, or left no results.
    """
    from utils.classification.outputs import SCORES_NAME  # torch: not while flags are parsed

    results = folder / dataset / SCORES_NAME
    if not results.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        command = [sys.executable, str(TRAINER), "--datasets", dataset, "--output_dir", str(folder), *flags]
        if status := runner(command, log):
            said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            remedy = f"train_classifier.py ended with status {status}: {said[-1] if said else 'no output'}"
            refuse("trial", folder.name, f"{remedy} (full log: {log})")
        if not results.exists():
            refuse("trial", folder.name, f"train_classifier.py wrote no {results}; see {log}")
    found: TrialResults = json.loads(results.read_text())
    return found
