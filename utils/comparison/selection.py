"""Run a private selection: the draw, the trials in a secret folder, and the release of the winner.

Everything about the trials is secret: their number, candidates, models, scores, logs and duration. So they are in a
folder that only its owner can read and that is deleted at the end. Only the winner's model is released, without its
report, which states the epsilon of one run.

An interrupted selection resumes with the same draw. An interrupted trial starts afresh: nobody has seen its output, so
its partial training costs nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.accounting.selection import DrawnTrial, best_of
from dptune.ledger import LEDGER_NAME, Ledger
from utils.classification.outputs import SCORES_NAME
from utils.comparison.outcomes import METRIC
from utils.comparison.release import PublicPlan, SelectionPlan, Winner, released, write_release
from utils.comparison.trials import Candidate, TrialResults

_DRAW_NAME = "draw.json"

TrainTrial = Callable[[Candidate, Path], TrialResults]  # (candidate, folder) -> results


def select(plan: SelectionPlan, secret: Path, release: Path, train: TrainTrial) -> Winner | None:
    """Run the selection, release its winner and return it; None if no trial was drawn.

    Args:
        plan: the plan.
        secret: folder for the trials, deleted at the end.
        release: folder written when the selection is done: the model, `selection.json` and a model card.
        train: trains one trial privately, with exactly the noise, sampling and steps of the plan.

    Raises:
        InvalidArgument: a trial did not train with the settings of the plan, or `secret` holds an interrupted
            selection with another plan.
    """
    if (earlier := released(release)) is not None:
        _require_same(plan, earlier.plan)
        shutil.rmtree(secret, ignore_errors=True)  # left by a selection that was stopped right after its release
        return earlier.winner
    trials = _drawn(plan, secret)
    folders = [secret / f"trial-{number}" for number in range(len(trials))]
    scores, clip_norms = [], []
    for trial, folder in zip(trials, folders, strict=True):
        if not (folder / plan.dataset / SCORES_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)
        results = train(plan.candidates[trial.candidate], folder)
        _require_accounted(plan, folder, results)
        scores.append(_right_answers(plan, results))
        clip_norms.append(results["clip_norm"])
    winner, source = None, None
    if (best := best_of(scores, trials)) is not None:
        number, score = best
        chosen = replace(plan.candidates[trials[number].candidate], clip_norm=clip_norms[number])
        winner = Winner(chosen, round(score / plan.validation_examples, 3))  # coarser than the noise's own digits
        source = folders[number] / plan.dataset
    write_release(release, source, plan, winner)
    shutil.rmtree(secret)
    return winner


def planned_selection(secret: Path) -> PublicPlan | None:
    """The public plan of an unfinished selection in this folder; None if there is none."""
    path = secret / _DRAW_NAME
    plan: PublicPlan | None = json.loads(path.read_text())["plan"] if path.exists() else None
    return plan


def _drawn(plan: SelectionPlan, secret: Path) -> list[DrawnTrial]:
    """The trials of this selection and the noise of their scores: drawn once and kept over interruptions."""
    path = secret / _DRAW_NAME
    if path.exists():
        saved = json.loads(path.read_text())
        _require_same(plan, saved["plan"])
        return [DrawnTrial(*trial) for trial in saved["trials"]]
    secret.mkdir(parents=True, exist_ok=True)
    secret.chmod(0o700)
    trials = plan.selection.draw_trials(len(plan.candidates))
    with atomic_write(path) as file:
        json.dump({"secret": "not for publishing", "plan": plan.as_json(), "trials": trials}, file)
    return trials


def _require_same(plan: SelectionPlan, before: Mapping[str, object]) -> None:
    """Refuse an earlier selection with another plan. Older versions did not record the seed."""
    for name, value in plan.as_json().items():
        if before.get(name, value) != value:
            refuse(
                name, value, f"a selection with {before[name]!r} is in this folder; give that, or another --output_dir"
            )


def _require_accounted(plan: SelectionPlan, folder: Path, results: TrialResults) -> None:
    """Refuse a trial whose ledger does not hold exactly the plan's noisy steps: its epsilon would differ."""
    if not results["private"] or results["epsilon"] is None:
        refuse("epsilon", None, "a trial has no guarantee; private selection needs private trainings")
    spends = Ledger(folder / plan.dataset / LEDGER_NAME).spends
    if spends != [plan.spend]:
        refuse("ledger", spends, f"a trial must train with {plan.spend}, which is what epsilon is computed from")


def _right_answers(plan: SelectionPlan, results: TrialResults) -> int:
    """Number of correct records in the first validation split: one record changes it by at most one."""
    accuracy = next(iter(results["scores"].values()))[METRIC]
    return round(accuracy * plan.validation_examples)
