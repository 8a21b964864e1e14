"""The results that train_classifier.py writes to a task's folder at the end of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dptune._files import atomic_write
from dptune.run.identity import refuse_other_run
from utils.classification.arguments import Settings
from utils.classification.metrics import majority
from utils.classification.tasks import ClassificationTask
from utils.training.task import Finished

SCORES_NAME = "results.json"  # written last: if it exists, the run has finished
_NOTICE = "scores are of the validation split, which the privacy guarantee does not cover; seconds are not private"


def write_summary(finished: Finished, task: ClassificationTask, settings: Settings, trained_parameters: int) -> None:
    """Write `results.json`, for programs that compare runs."""
    statement, identity = finished.statement, finished.identity
    found = {
        "notice": _NOTICE,
        "task": task.name,
        "mode": settings.mode.finetune_mode,
        "private": settings.budget.enable_dp,
        "epsilon": statement.epsilon,
        "delta": statement.delta,
        "noise_multiplier": statement.noise_multiplier,
        "clip_norm": statement.clip_norm,
        "learning_rate": identity["learning_rate"],
        "head_learning_rate": identity["head_learning_rate"],
        "trained_parameters": trained_parameters,
        "steps": statement.steps,
        "expected_batch_size": statement.expected_batch_size,
        "train_examples": statement.num_examples,
        "scores": last_scores(finished),
        "majority": {split: majority(data.labels) for split, data in task.validation.items()},
        "seed": settings.steps.seed,
        "seconds": finished.results["seconds"],
        "settings": _published(identity),
    }
    with atomic_write(finished.folder / SCORES_NAME) as file:
        file.write(json.dumps(found, indent=2, allow_nan=False) + "\n")


def finished_results(folder: Path) -> dict[str, Any] | None:
    """The results of a finished run in this folder; None if there are none."""
    path = folder / SCORES_NAME
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def refuse_other_results(results: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse finished results of a run with another identity.

    Raises:
        InvalidArgument: the identities differ; the message names the setting and both values.
    """
    refuse_other_run(results["settings"], _published(identity), where=SCORES_NAME)


def _published(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without the data's fingerprint, with which anyone could confirm a guess of the data."""
    return {name: value for name, value in identity.items() if name != "training_data"}


def last_scores(finished: Finished) -> dict[str, dict[str, float]]:
    """The scores of the released weights: at the last evaluation, or at the step that they are from; empty without a
    validation split."""
    released = finished.results.get("released_step")
    rows = [row for row in finished.diagnostics if released in (None, row["step"])]
    return next((row["scores"] for row in reversed(rows) if "scores" in row), {})


def describe_scores(task: ClassificationTask, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Scores in printable lines, beside the share of the majority class, and a warning if they are no better."""
    shares = {split: majority(task.validation[split].labels) for split in scores}
    lines = [
        f"{split:<23}{', '.join(f'{metric} {value:.4f}' for metric, value in found.items())} "
        f"(majority class: {shares[split]:.4f})"
        for split, found in scores.items()
    ]
    return lines + [
        f"{'warning':<23}on {split} it is no better than always giving the majority class (not private): it learned "
        "nothing yet; give more steps or rows, a larger batch or epsilon, or another learning rate"
        for split, found in scores.items()
        if found.get("accuracy", math.inf) <= shares[split]
    ]
