"""What a training run writes to its folder: the trained weights, and what may and may not be published about them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dptune._files import atomic_write
from dptune.report.card import published_name
from dptune.report.plots import plot_diagnostics
from dptune.report.publish import publish
from dptune.report.statement import REPORT_NAME
from dptune.run.session import PrivateRun, describe_end
from utils.files.folders import RUN_CONFIG_NAME
from utils.training.log import DIAGNOSTICS_NAME, write_all_results
from utils.training.task import PER_TOKEN, Finished, Task

CONFIG_NAME = RUN_CONFIG_NAME
RESULTS_NAME = "all_results.json"

_PACKAGES = ("transformers", "accelerate")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved settings, without secrets."""
    with atomic_write(folder / CONFIG_NAME) as file:
        file.write(json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finish_run(
    run: PrivateRun,
    task: Task,
    diagnostics: Sequence[Mapping[str, Any]],
    *,
    released: int | None = None,
    average: str | None = None,
) -> None:
    """Write all results of a finished run, and print what they are. Only the main process calls it.

    The trained weights appear together with their privacy report, in the folder that may be published. `released` is
    the step that the weights are from, if it is not the last. `average` says in words what they average, if they do.
    """
    statement = run.statement(_PACKAGES, average=average)
    results = summarise_run(diagnostics, per_token=task.loss_unit == PER_TOKEN, released=released)
    plot_diagnostics(run.folder / "diagnostics.png", diagnostics, loss_unit=task.loss_unit)
    write_all_results(run.folder / RESULTS_NAME, results)
    published = publish(
        run.folder,
        statement,
        task.save,
        ledger=run.ledger,
        base_model=task.base_model,
        artifact=task.artifact,
        card=task.card,
        settings=task.settings,
    )
    further = task.conclude(Finished(run.folder, statement, run.identity, diagnostics, results))
    files = _describe_files(run.folder, published, task, results)
    print(*describe_end(run, statement), *files, *further, sep="\n")


def summarise_run(rows: Sequence[Mapping[str, Any]], *, per_token: bool, released: int | None = None) -> dict[str, Any]:
    """Final figures from the rows of the diagnostics, with a perplexity if losses are per token. NOT private.

    `released` is the step that the weights are from, if it is not the last; the held-out loss is of these weights.
    """
    steps = [row for row in rows if row["step"] > 0]
    held_out = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}
    losses = [row["loss"] for row in steps if row.get("loss") is not None]
    seconds, tokens = (sum(row.get(key) or 0 for row in steps) for key in ("seconds", "tokens"))
    results: dict[str, Any] = {"steps": len(steps), "seconds": seconds, "tokens": tokens}
    results["tokens_per_second"] = tokens / seconds if seconds else None
    results["train_loss"] = sum(losses[-10:]) / len(losses[-10:]) if losses else None
    if released is not None:
        results["released_step"] = released
    if held_out:
        last = held_out[max(held_out) if released is None else released]
        results |= {"eval_loss_before": held_out.get(0), "eval_loss": last}
        if per_token:
            results["perplexity"] = math.exp(min(last, 700))
    return results


def _describe_files(folder: Path, published: Path, task: Task, results: Mapping[str, Any]) -> list[str]:
    """Printed lines: the held-out loss and the paths of the files."""
    lines = []
    if "eval_loss" in results:
        before = results["eval_loss_before"]
        start = "" if before is None else f"{before:.4f} before, "
        lines.append(f"held-out loss          {start}{results['eval_loss']:.4f} after")
    lines += [
        f"not private            {folder / DIAGNOSTICS_NAME}, diagnostics.png, {RESULTS_NAME}",
        f"privacy report         {published / REPORT_NAME}",
        f"{task.artifact.noun:<23}{published}",
    ]
    if (base := task.base_model) != published_name(base):
        lines.append(f"base model             {base} is a path; to publish, resume with --base_model_name NAME")
    return lines
