"""What a private selection releases: its plan, the winner's model, and a statement of what all of it together costs.

The winner's own report and card stay behind: they state the epsilon of one run, which is too small here.
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
from utils.comparison.trials import Candidate

RELEASE_NAME, CARD_NAME = "selection.json", "README.md"
_TIME = 946684800  # of everything released, 2000-01-01: when the winner was trained tells how long the selection ran on
MODEL_FOLDERS = ("model", "adapter")  # what of a training's folder is the model
_PRIVACY_UNIT = "one record of the training set or of the validation set, added or removed"
_METHOD = "private selection (Papernot and Steinke 2022) among runs of DP-SGD"


@dataclass(frozen=True)
class SelectionPlan:
    """All that is decided before the first trial, and is public.

    Attributes:
        dataset: its name.
        selection: how many trials on average, how noisy their scores.
        candidates: what a trial picks from.
        spend: the noisy steps of each trial.
        delta: chance that the bound may fail.
        train_examples, validation_examples: how many records there are of each.
        seed: of every trial's new weights.
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
        """Of everything that is released, for a record of either set."""
        return self.selection.epsilon(self.spend, self.delta)

    def as_json(self) -> dict[str, object]:
        """What may be published about it."""
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
    """The best trial: what it trained, with the clip norm that it used, and its noisy accuracy."""

    candidate: Candidate
    noisy_accuracy: float


class PublicPlan(TypedDict):
    """Of what `SelectionPlan.as_json` holds, what is read again."""

    epsilon: float
    delta: float


class Release(NamedTuple):
    """What `selection.json` says: the plan, and the winner where a trial was drawn."""

    plan: PublicPlan
    winner: Winner | None


def released(folder: Path) -> Release | None:
    """What an earlier selection released into `folder`; None where there is nothing."""
    path = folder / RELEASE_NAME
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return Release(found, found["winner"] and Winner(Candidate(**found["winner"]), found["noisy_accuracy"]))


def write_release(release: Path, source: Path | None, plan: SelectionPlan, winner: Winner | None) -> None:
    """Make the folder, whole or not at all: the model where there is one, and what may be said of it.

    It is on the disk when this returns: the caller then removes what it was made from.

    Args:
        release: the folder; may not be there.
        source: the winner's folder, of which nothing but the model is taken; None where nothing is released.
        plan, winner: for `selection.json`, and in words for the model card.
    """
    partial = release.with_name(f".{release.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if source is not None:
        models = [source / name for name in MODEL_FOLDERS if (source / name).is_dir()]
        if not models:
            raise RuntimeError(f"{source} holds no model")
        for model in models:
            shutil.copytree(model, partial / model.name)
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


def _card(plan: SelectionPlan, winner: Winner | None) -> str:
    """The release in words."""
    title = f"# Private selection on {plan.dataset}: epsilon {rounded_up(plan.epsilon(), 2)}"
    return "\n".join([title, "", *_result(plan, winner), "", *_guarantee(plan), ""])


def _result(plan: SelectionPlan, winner: Winner | None) -> list[str]:
    if winner is None:
        return ["The number of trials that was drawn is 0: nothing was trained and nothing is released."]
    best, noise = winner.candidate, plan.selection.validation_noise / plan.validation_examples
    return [
        "| mode | learning rate | clip norm | accuracy (noisy) | standard deviation of its noise |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| {best.mode} | {best.learning_rate:g} | {best.clip_norm:g} | {winner.noisy_accuracy:.3f} | {noise:.3f} |",
        "",
        "`model` loads with transformers' `from_pretrained`, `adapter` with PEFT's (docs/classification.md).",
    ]


def _guarantee(plan: SelectionPlan) -> list[str]:
    selection, spend = plan.selection, plan.spend
    return [
        f"All of this together, the model too, is ({rounded_up(plan.epsilon(), 2)}, {plan.delta:g})-differentially "
        f"private for {_PRIVACY_UNIT}: {_METHOD}, {SELECTION_ACCOUNTANT}. A {selection.distribution} number of trials, "
        f"{selection.mean_trials:g} on average, picked among {len(plan.candidates)} candidates; each trained "
        f"{spend.steps:,} steps with noise multiplier {spend.noise_multiplier:g} and sampling probability "
        f"{spend.sampling_probability:.4g}, and its number of right answers got Gaussian noise of "
        f"{selection.validation_noise:g} records.",
        "",
        "This holds if nothing else about the trials is published: not how many there were, not the losers, no exact "
        "score, no log, and not how long it took.",
    ]
