"""Trials: one training each by `train_classifier.py`, in a process and a folder of its own.

A finished trial left `results.json`, and is not run again.
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

Runner = Callable[[Sequence[str], Path], int]  # (command line, file for what it prints) -> exit status


class TrialResults(TypedDict):
    """What `results.json` says of a training, as far as a comparison reads it; `scores` are by split and metric."""

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
    """What is compared: a mode at a learning rate and, with privacy, a clip norm, None for the trainer's."""

    mode: str
    learning_rate: float
    clip_norm: float | None = None

    def __str__(self) -> str:
        """As a trial's folder is called."""
        clip_norm = "" if self.clip_norm is None else f"_clip{self.clip_norm!r}"
        return f"{self.mode}_lr{self.learning_rate!r}{clip_norm}"

    @property
    def flags(self) -> list[str]:
        """As the trainer takes them."""
        flags = ["--finetune_mode", self.mode, "--learning_rate", repr(self.learning_rate)]
        return flags if self.clip_norm is None else [*flags, "--max_grad_norm", repr(self.clip_norm)]


def run_in_process(command: Sequence[str], log: Path) -> int:
    """Run it with this interpreter; what it prints goes to `log`, behind what an earlier attempt left."""
    with log.open("ab") as file:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False)
    return run.returncode


def run_trial(dataset: str, folder: Path, flags: Sequence[str], runner: Runner) -> TrialResults:
    """What a training on `dataset` wrote as its results; it is run unless it is there already.

    Args:
        dataset: one name for --datasets.
        folder: of this trial alone; its log stands beside it.
        flags: all others.
        runner: `run_in_process`, or what stands in for it in tests.

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
            remedy = f"train_classifier.py ended with status {status}: {said[-1] if said else 'nothing said'}"
            refuse("trial", folder.name, f"{remedy} (all of it in {log})")
        if not results.exists():
            refuse("trial", folder.name, f"train_classifier.py left no {results}; see {log}")
    found: TrialResults = json.loads(results.read_text())
    return found
