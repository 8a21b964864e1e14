"""The release of a private selection: its plan, the winner's model, and a statement of the epsilon of both together.

The winner's own report and card are not released: they state the epsilon of one run, which is too small here.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from dptune._files import sync_folder, sync_tree
from dptune.accounting import Spend
from dptune.accounting.rounding import rounded_up
from dptune.accounting.selection import SELECTION_ACCOUNTANT, PrivateSelection
from dptune.published import PUBLISH_NAME
from dptune.report.check import is_model_file
from utils.comparison.trials import Candidate

RELEASE_NAME, CARD_NAME = "selection.json", "README.md"
_TIME = 946684800  # 2000-01-01, the time stamp of all released files: real times reveal how long the selection ran
_PRIVACY_UNIT = "one record of the training set or of the validation set, added or removed"
_METHOD = "private selection (Papernot and Steinke 2022) among runs of DP-SGD"


@dataclass(frozen=True)
class SelectionPlan:
    """The public settings of a selection, decided before the first trial.

    Attributes:
        dataset: name of the data set.
        selection: distribution of the number of trials, and the noise of their scores.
        candidates: settings that trials are drawn from.
        spend: the noisy steps of each trial.
        delta: probability that the epsilon bound fails.
        train_examples, validation_examples: numbers of records.
        seed: seed of each trial's new weights.
    """

    dataset: str
    selection: PrivateSelection
    candidates: tuple[Candidate, ...]
    spend: Spend
    delta: float
    train_examples: int
    validation_examples: int
    seed: int

    def epsilon(self) -> float:
        """Epsilon of everything released, for a training or validation record."""
        return self.selection.epsilon(self.spend, self.delta)

    def as_json(self) -> dict[str, object]:
        """The plan as publishable JSON values."""
        return {
            "dataset": self.dataset,
            "distribution_of_trials": self.selection.distribution,
            "mean_trials": self.selection.mean_trials,
            "validation_noise": self.selection.validation_noise,
            "epsilon": self.epsilon(),
            "delta": self.delta,
            "privacy_unit": _PRIVACY_UNIT,
            "method": _METHOD,
            "accountant": SELECTION_ACCOUNTANT,
            "noise_multiplier": self.spend.noise_multiplier,
            "sampling_probability": self.spend.sampling_probability,
            "steps": self.spend.steps,
            "train_examples": self.train_examples,
            "validation_examples": self.validation_examples,
            "seed": self.seed,
            "candidates": [asdict(one) for one in self.candidates],
        }


class Winner(NamedTuple):
    """The best trial: its settings, with the clip norm that it used, and its noisy accuracy."""

    candidate: Candidate
    noisy_accuracy: float


class PublicPlan(TypedDict):
    """The parts of `SelectionPlan.as_json` that are read back."""

    epsilon: float
    delta: float


class Release(NamedTuple):
    """The content of `selection.json`: the plan, and the winner unless no trial was drawn."""

    plan: PublicPlan
    winner: Winner | None


def released(folder: Path) -> Release | None:
    """What an earlier selection released into `folder`; None if nothing."""
    path = folder / RELEASE_NAME
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return Release(found, found["winner"] and Winner(Candidate(**found["winner"]), found["noisy_accuracy"]))


def write_release(release: Path, source: Path | None, plan: SelectionPlan, winner: Winner | None) -> None:
    """Write the release folder, whole or not at all: the model, if there is one, `selection.json` and a card.

    It is on disk when this returns, because the caller then deletes the trials.

    Args:
        release: the folder; must not exist.
        source: the winner's folder, from which only the model is copied; None if no trial was drawn.
        plan, winner: for `selection.json` and the model card.
    """
    partial = release.with_name(f".{release.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if source is not None:
        _copy_model(source / PUBLISH_NAME, partial)
    content = plan.as_json() | {"winner": winner and asdict(winner.candidate)}
    if winner is not None:
        content["noisy_accuracy"] = winner.noisy_accuracy
    (partial / RELEASE_NAME).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    (partial / CARD_NAME).write_text(_card(plan, winner))
    for path in [partial, *partial.rglob("*")]:
        os.utime(path, (_TIME, _TIME))
    sync_tree(partial)
    partial.rename(release)
    sync_folder(release.parent)


def _copy_model(published: Path, release: Path) -> None:
    """Copy the files of the model, and not those that state the epsilon of one run."""
    files = [path for path in sorted(published.rglob("*")) if path.is_file()]
    models = [path for path in files if is_model_file(path.relative_to(published).as_posix())]
    if not models:
        raise RuntimeError(f"{published} holds no model")
    for path in models:
        copy = release / path.relative_to(published)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _card(plan: SelectionPlan, winner: Winner | None) -> str:
    """The text of the release's card."""
    title = f"# Private selection on {plan.dataset}: epsilon {rounded_up(plan.epsilon(), 2)}"
    return "\n".join([title, "", *_result(plan, winner), "", *_guarantee(plan), ""])


def _result(plan: SelectionPlan, winner: Winner | None) -> list[str]:
    if winner is None:
        return ["The drawn number of trials is 0: nothing was trained and no model is released."]
    best, noise = winner.candidate, plan.selection.validation_noise / plan.validation_examples
    return [
        "| mode | learning rate | clip norm | noisy accuracy | standard deviation of its noise |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| {best.mode} | {best.learning_rate:g} | {best.clip_norm:g} | {winner.noisy_accuracy:.3f} | {noise:.3f} |",
        "",
        "How to load the model in this folder: docs/how_to/classification.md.",
    ]


def _guarantee(plan: SelectionPlan) -> list[str]:
    selection, spend = plan.selection, plan.spend
    return [
        f"This release, including the model, is ({rounded_up(plan.epsilon(), 2)}, {plan.delta:g})-differentially "
        f"private for {_PRIVACY_UNIT}: {_METHOD}, {SELECTION_ACCOUNTANT}. The number of trials had a "
        f"{selection.distribution} distribution with mean {selection.mean_trials:g}. Each trial picked one of "
        f"{len(plan.candidates)} candidates and trained {spend.steps:,} steps with noise multiplier "
        f"{spend.noise_multiplier:g} and sampling probability {spend.sampling_probability:.4g}. Its number of correct "
        f"answers got Gaussian noise of {selection.validation_noise:g} records.",
        "",
        "This holds only if nothing else about the trials is published: not how many there were, no other trial, no "
        "exact score, no log, and not how long it took.",
    ]
