"""What a training run leaves in its folder: the adapter, what may be published about it, and what may not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.accounting import Spend, compose
from dptune.accounting.rounding import rounded_up
from dptune.adapter_files import WEIGHTS_NAME, save_adapter
from dptune.ledger import Ledger, has_begun
from dptune.lora import adapters
from dptune.noise import GaussianNoise
from dptune.report.card import LORA_ADAPTER, WHOLE_MODEL, Artifact, published_name, write_model_card
from dptune.report.plots import plot_diagnostics, plot_epsilon
from dptune.report.statement import PrivacyStatement, state_no_privacy, state_privacy, write_privacy_report
from dptune.run.checkpoint import LEDGER_NAME
from utils.models.trainable import MODEL_NAME, save_trained_model
from utils.training.log import DIAGNOSTICS_NAME, write_all_results
from utils.training.plan import RunPlan

REPORT_NAME = "privacy_report.json"
CONFIG_NAME = "run_config.json"
RESULTS_NAME = "all_results.json"
EPSILON_PLOT = "epsilon.png"

_CURVE_POINTS = 20


def refuse_existing_run(output_dir: str) -> None:
    """A folder with a run in it is left alone: its ledger and its adapter belong together."""
    folder = Path(output_dir)
    for name in (LEDGER_NAME, REPORT_NAME, WEIGHTS_NAME, MODEL_NAME, DIAGNOSTICS_NAME):
        if has_begun(folder / name) if name == LEDGER_NAME else (folder / name).exists():
            refuse("--output_dir", output_dir, f"holds a run already ({name}); give another folder or move it away")


def start_run(
    folder: Path, config: Mapping[str, Any], *, private: bool, is_main: bool, group_size: int = 1
) -> Ledger | None:
    """Make the folder, write the resolved settings, open the ledger of a private run; the main process alone does."""
    if not is_main:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG_NAME) as file:
        file.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return Ledger(folder / LEDGER_NAME, group_size=group_size) if private else None


def finish_run(
    folder: Path,
    model: nn.Module,
    plan: RunPlan,
    ledger: Ledger | None,
    *,
    completed: int,
    noise: GaussianNoise | None,
    base_model: str,
    tokenizer: Any,
    diagnostics: Sequence[Mapping[str, Any]],
) -> None:
    """Write everything at the end of a run and say what it is. What was trained comes last: where it is, its report
    is."""
    whole = not any(adapters(model))
    statement = statement_of(plan, ledger, noise, completed)
    artifact = WHOLE_MODEL if whole else LORA_ADAPTER
    write_statement(folder, statement, base_model=base_model, artifact=artifact)
    results = summarise_run(diagnostics)
    write_measured(folder, statement, diagnostics, results)
    if whole:
        save_trained_model(model, tokenizer, folder)
    else:
        save_adapter(model, folder, base_model=published_name(base_model))
    saved = {"model": MODEL_NAME} if whole else {"adapter": WEIGHTS_NAME}
    print(*describe_end(folder, plan, completed, statement, results, saved), sep="\n")


def write_statement(folder: Path, statement: PrivacyStatement, *, base_model: str, artifact: Artifact) -> None:
    """Write what may be published beside what was trained: the report, the plot of epsilon and the card."""
    write_privacy_report(folder / REPORT_NAME, statement)
    plot = None
    if statement.epsilon is not None:
        plot = EPSILON_PLOT
        _plot_epsilon(folder / plot, statement)
    write_model_card(folder / "README.md", statement, base_model=base_model, epsilon_plot=plot, artifact=artifact)


def write_measured(
    folder: Path,
    statement: PrivacyStatement,
    diagnostics: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    **plot: str,
) -> None:
    """Write what may not be published: the plot of the diagnostics (`plot` goes to it) and the final figures."""
    plot_diagnostics(folder / "diagnostics.png", diagnostics, clip_norm=statement.clip_norm, **plot)
    write_all_results(folder / RESULTS_NAME, results)


def summarise_run(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Final figures from the rows of the diagnostics. NOT private."""
    steps = [row for row in rows if row["step"] > 0]
    held_out = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}
    losses = [row["loss"] for row in steps if row.get("loss") is not None]
    seconds, tokens = (sum(row.get(key) or 0 for row in steps) for key in ("seconds", "tokens"))
    results: dict[str, Any] = {"steps": len(steps), "seconds": seconds, "tokens": tokens}
    results["tokens_per_second"] = tokens / seconds if seconds else None
    results["train_loss"] = sum(losses[-10:]) / len(losses[-10:]) if losses else None
    if held_out:
        last = held_out[max(held_out)]
        results |= {"eval_loss_before": held_out.get(0), "eval_loss": last, "perplexity": math.exp(min(last, 700))}
    return results


def statement_of(plan: RunPlan, ledger: Ledger | None, noise: GaussianNoise | None, completed: int) -> PrivacyStatement:
    """What a run of so many steps guarantees, by its ledger."""
    unit: dict[str, Any] = {"privacy_unit": plan.unit.name, "method": plan.unit.how, "sampled": plan.unit.sampled}
    unit["packages"] = ("transformers", "accelerate", "cryptography")
    if plan.privacy is not None and ledger is not None and noise is not None:
        repeated = ledger.steps - completed
        return state_privacy(plan.privacy, ledger, noise, repeated_steps=repeated, **unit)
    return state_no_privacy(
        num_examples=plan.num_examples,
        expected_batch_size=plan.expected_batch_size,
        steps=completed,
        **unit,
    )


def describe_end(
    folder: Path,
    plan: RunPlan,
    completed: int,
    statement: PrivacyStatement,
    results: Mapping[str, Any],
    saved: Mapping[str, str],
) -> list[str]:
    """A run that has ended, in lines for a person; `saved` says what is in which file of the folder."""
    lines = []
    if completed < plan.steps:
        reason = "one more would exceed --target_epsilon"
        lines.append(f"stopped by budget      after step {completed} of {plan.steps}: {reason}")
    if statement.epsilon is None:
        lines.append("privacy                NONE: " + "; ".join(statement.reasons))
    else:
        lines.append(f"privacy                epsilon {rounded_up(statement.epsilon)} at delta {statement.delta:g}")
    if statement.repeated_steps:
        lines.append(f"repeated steps         {statement.repeated_steps:,}, lost in a crash: they count in epsilon")
    if "eval_loss" in results:
        before = results["eval_loss_before"]
        start = "" if before is None else f"{before:.4f} before, "
        lines.append(f"held-out loss          {start}{results['eval_loss']:.4f} after")
    return [
        *lines,
        *(f"{what:<23}{folder / name}" for what, name in saved.items()),
        f"privacy report         {folder / REPORT_NAME}",
        f"not private            {folder / DIAGNOSTICS_NAME}, diagnostics.png, {RESULTS_NAME}",
    ]


def _plot_epsilon(path: Path, statement: PrivacyStatement) -> None:
    assert statement.noise_multiplier is not None
    assert statement.delta is not None
    steps = sorted({round(step) for step in np.linspace(1, statement.steps, _CURVE_POINTS)})
    sigma, q, group_size = statement.noise_multiplier, statement.sampling_probability, statement.group_size
    spends = [Spend(sigma, q, step, group_size) for step in steps]
    epsilons = [compose([spend], delta=statement.delta) for spend in spends]
    plot_epsilon(path, steps, epsilons, statement)
