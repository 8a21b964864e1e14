"""Adds to transformers' checkpoints what a private run needs to resume: its identity and a copy of its ledger."""

from __future__ import annotations

import json
from pathlib import Path

from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.ledger import LEDGER_NAME
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
        return SavedRun(ledger=folder / LEDGER_NAME, **json.loads((folder / PRIVACY_STATE_NAME).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        remedy = f"holds no readable {PRIVACY_STATE_NAME} ({type(error).__name__})"
        refuse("--resume_from_checkpoint", str(folder), f"{remedy}; give an older checkpoint of a private run")
