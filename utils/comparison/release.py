"""What a private selection releases: the winner's model, and a statement of what all of it together costs.

The winner's own report and card stay behind: they state the epsilon of one run, which is too small here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dptune._files import sync_folder, sync_tree
from dptune.accounting.rounding import rounded_up

RELEASE_NAME, CARD_NAME = "selection.json", "README.md"
_TIME = 946684800  # of everything released, 2000-01-01: when the winner was trained tells how long the selection ran on
MODEL_FOLDERS = ("model", "adapter")  # what of a training's folder is the model


def released(folder: Path) -> dict[str, Any] | None:
    """What an earlier selection released into `folder`; None where there is nothing."""
    path = folder / RELEASE_NAME
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def write_release(release: Path, source: Path | None, content: Mapping[str, Any]) -> None:
    """Make the folder, whole or not at all: the model where there is one, and what may be said of it.

    It is on the disk when this returns: the caller then removes what it was made from.

    Args:
        release: the folder; may not be there.
        source: the winner's folder, of which nothing but the model is taken; None where nothing is released.
        content: for `selection.json`, and in words for the model card.
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
    (partial / RELEASE_NAME).write_text(json.dumps(content, indent=2) + "\n")
    (partial / CARD_NAME).write_text(_card(content))
    for path in [partial, *partial.rglob("*")]:
        os.utime(path, (_TIME, _TIME))
    sync_tree(partial)
    partial.rename(release)
    sync_folder(release.parent)


def _card(content: Mapping[str, Any]) -> str:
    """The release in words."""
    return "\n".join(["# " + _title(content), "", *_result(content), "", *_guarantee(content), ""])


def _title(content: Mapping[str, Any]) -> str:
    return f"Private selection on {content['dataset']}: epsilon {rounded_up(content['epsilon'], 2)}"


def _result(content: Mapping[str, Any]) -> Sequence[str]:
    if content["winner"] is None:
        return ["The number of trials that was drawn is 0: nothing was trained and nothing is released."]
    winner = content["winner"]
    noise = content["validation_noise"] / content["validation_examples"]
    return [
        "| mode | learning rate | clip norm | accuracy (noisy) | standard deviation of its noise |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| {winner['mode']} | {winner['learning_rate']:g} | {winner['clip_norm']:g} "
        f"| {content['noisy_accuracy']:.3f} | {noise:.3f} |",
        "",
        "`model` loads with transformers' `from_pretrained`, `adapter` with PEFT's (docs/classification.md).",
    ]


def _guarantee(content: Mapping[str, Any]) -> Sequence[str]:
    spent = f"({rounded_up(content['epsilon'], 2)}, {content['delta']:g})"
    return [
        f"All of this together, the model too, is {spent}-differentially private for {content['privacy_unit']}: "
        f"{content['method']}, {content['accountant']}. A {content['distribution_of_trials']} number of trials, "
        f"{content['mean_trials']:g} on average, picked among {len(content['candidates'])} candidates; each trained "
        f"{content['steps']:,} steps with noise multiplier {content['noise_multiplier']:g} and sampling probability "
        f"{content['sampling_probability']:.4g}, and its number of right answers got Gaussian noise of "
        f"{content['validation_noise']:g} records.",
        "",
        "This holds if nothing else about the trials is published: not how many there were, not the losers, no exact "
        "score, no log, and not how long it took.",
    ]
