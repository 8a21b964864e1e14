"""What a run of train_classifier.py leaves in a task's folder at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dptune._files import atomic_write
from dptune.ledger import Ledger
from dptune.noise import GaussianNoise
from dptune.report.statement import PrivacyStatement
from dptune.run.identity import refuse_other_run
from utils.classification.arguments import Settings
from utils.classification.files import classifier_artifact, save_classifier
from utils.classification.metrics import majority
from utils.classification.tasks import ClassificationTask
from utils.training.outputs import describe_end, statement_of, summarise_run, write_measured, write_statement
from utils.training.plan import RunPlan

SCORES_NAME = "results.json"  # the last file of a run: where it is, the run has ended
_NOTICE = "scores are of the validation split, which the privacy guarantee does not cover; seconds are not private"


def finish_classifier(
    folder: Path,
    model: Any,
    tokenizer: Any,
    task: ClassificationTask,
    plan: RunPlan,
    settings: Settings,
    identity: Mapping[str, Mapping[str, Any]],
    ledger: Ledger | None,
    *,
    completed: int,
    noise: GaussianNoise | None,
    diagnostics: Sequence[Mapping[str, Any]],
) -> None:
    """Write report, card, plots and what was trained, then `results.json`; the main process alone does. `identity` is
    what a resumed run must share."""
    statement = statement_of(plan, ledger, noise, completed)
    base_model = settings.checkpoint.model_checkpoint
    write_statement(folder, statement, base_model=base_model, artifact=classifier_artifact(model))
    results = summarise_run(diagnostics)
    results.pop("perplexity", None)
    write_measured(folder, statement, diagnostics, results, loss_unit="nats an example")
    saved = save_classifier(model, tokenizer, folder, base_model=base_model)
    scores = last_scores(diagnostics)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    measured: dict[str, Any] = {"scores": scores, "trained_parameters": trained, "seconds": results["seconds"]}
    found = summary(task, statement, settings, identity, **measured)
    with atomic_write(folder / SCORES_NAME) as file:
        file.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
    print(*describe_end(folder, plan, completed, statement, results, saved), *describe_scores(task, scores), sep="\n")


def summary(
    task: ClassificationTask,
    statement: PrivacyStatement,
    settings: Settings,
    identity: Mapping[str, Mapping[str, Any]],
    *,
    scores: Mapping[str, Mapping[str, float]],
    trained_parameters: int,
    seconds: float,
) -> dict[str, Any]:
    """What `results.json` holds, for programs that compare runs."""
    return {
        "notice": _NOTICE,
        "task": task.name,
        "mode": settings.mode.finetune_mode,
        "private": settings.budget.enable_dp,
        "epsilon": statement.epsilon,
        "delta": statement.delta,
        "noise_multiplier": statement.noise_multiplier,
        "clip_norm": statement.clip_norm,
        "learning_rate": identity["updates"]["learning_rate"],
        "head_learning_rate": identity["updates"]["head_learning_rate"],
        "trained_parameters": trained_parameters,
        "steps": statement.steps,
        "expected_batch_size": statement.expected_batch_size,
        "train_examples": statement.num_examples,
        "scores": scores,
        "majority": {split: majority(data.labels) for split, data in task.validation.items()},
        "seed": settings.steps.seed,
        "seconds": seconds,
        "settings": _published(identity),
    }


def finished_results(folder: Path) -> dict[str, Any] | None:
    """What a run that has ended left in its folder; None where there is none."""
    path = folder / SCORES_NAME
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def refuse_other_results(results: Mapping[str, Any], identity: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to take finished results for those of a run with another identity; results from before identities were
    kept are compared by what they have.

    Raises:
        InvalidArgument: they differ; the message names what, with both values.
    """
    run, updates = identity["run"], identity["updates"]
    top = {
        "mode": run["finetune_mode"],
        "clip_norm": run["clip_norm"],
        "noise_multiplier": run["noise_multiplier"],
        "delta": run["delta"],
        "learning_rate": updates["learning_rate"],
        "head_learning_rate": updates["head_learning_rate"],
        "expected_batch_size": run["expected_batch_size"],
        "train_examples": run["num_examples"],
        "seed": updates["seed"],
        "settings": _published(identity),
    }
    saved = {name: results[name] for name in top if name in results}
    refuse_other_run(saved, {name: top[name] for name in saved}, where=SCORES_NAME)


def _published(identity: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Without the data's fingerprint, which lets a guess of the data be confirmed."""
    run = {name: value for name, value in identity["run"].items() if name != "training_data"}
    return {"run": run, "updates": dict(identity["updates"])}


def last_scores(diagnostics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Those of the last evaluation; none without a validation split."""
    return next((row["scores"] for row in reversed(diagnostics) if "scores" in row), {})


def describe_scores(task: ClassificationTask, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Scores in lines for a person, beside the share of the commonest class."""
    return [
        f"{split:<23}{', '.join(f'{metric} {value:.4f}' for metric, value in found.items())} "
        f"(commonest class: {majority(task.validation[split].labels):.4f})"
        for split, found in scores.items()
    ]
