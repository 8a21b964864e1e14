"""Adds to transformers' checkpoints what a run needs to resume: its identity, a copy of its ledger, and its average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.adapter_files import torch_bytes
from dptune.iterate_average import IterateAverage
from dptune.ledger import LEDGER_NAME
from dptune.run.checkpoint import AVERAGE_NAME
from dptune.run.session import PrivateRun, SavedRun

PRIVACY_STATE_NAME = "privacy_state.json"


def save_privacy_state(run: PrivateRun, checkpoint: str | Path) -> None:
    """Write the run's identity and a copy of its ledger to the folder `checkpoint`. Main process only."""
    folder, steps = Path(checkpoint), 0
    if run.ledger is not None:
        steps = run.ledger.steps
        with atomic_write(folder / LEDGER_NAME, "wb") as file:
            file.write(run.ledger.content())
    state = {"step": run.completed, "ledger_steps": steps, "identity": run.identity}
    state["mechanism"] = run.mechanism_state()
    with atomic_write(folder / PRIVACY_STATE_NAME) as file:
        file.write(json.dumps(state, indent=2, allow_nan=False) + "\n")


def read_privacy_state(checkpoint: str | Path) -> SavedRun:
    """Read what `save_privacy_state` wrote to the folder `checkpoint`.

    Raises:
        InvalidArgument: the checkpoint is not of a private run, or is damaged.
    """
    folder = Path(checkpoint)
    try:
        saved = SavedRun(ledger=folder / LEDGER_NAME, **json.loads((folder / PRIVACY_STATE_NAME).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        remedy = f"holds no readable {PRIVACY_STATE_NAME} ({type(error).__name__})"
        refuse("--resume_from_checkpoint", str(folder), f"{remedy}; give an older checkpoint of a private run")
    if not (folder / TRAINER_STATE_NAME).is_file():  # the last file that a Trainer writes
        remedy = f"is not complete, it has no {TRAINER_STATE_NAME}; give an older checkpoint of a private run"
        refuse("--resume_from_checkpoint", str(folder), remedy)
    return saved


def save_average(average: IterateAverage, checkpoint: str | Path) -> None:
    """Write the average of the weights to the folder `checkpoint`, if it holds a step yet. Main process only."""
    if average.count:
        with atomic_write(Path(checkpoint) / AVERAGE_NAME, "wb") as file:
            file.write(torch_bytes({"count": average.count, "tensors": average.tensors}))


def read_average(average: IterateAverage, checkpoint: str | Path) -> None:
    """Fill in what `save_average` wrote to the folder `checkpoint`, which is named after its step. Every process must
    call this.

    Raises:
        InvalidArgument: the file is missing, damaged or of another model, or does not fit (see
            `IterateAverage.resume`).
    """
    path = Path(checkpoint) / AVERAGE_NAME
    count, tensors = _saved_average(path)
    if not average.resume(int(path.parent.name.rpartition("-")[2]), count):
        return
    for name, tensor in average.tensors.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            refuse("--resume_from_checkpoint", str(path), f"is of another model: it has no {name} of that shape")
        tensor.copy_(tensors[name])


def _saved_average(path: Path) -> tuple[int, dict[str, Tensor]]:
    """(the number of steps, the average by name) in a file; (0, {}) if there is none."""
    if not path.exists():
        return 0, {}
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return int(found["count"]), dict(found["tensors"])
    except Exception as error:  # a file that `save_average` did not write can fail in any way
        remedy = f"is no readable average ({type(error).__name__}); give an older checkpoint"
        refuse("--resume_from_checkpoint", str(path), remedy)
