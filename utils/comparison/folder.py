"""The folder of a comparison of fine-tuning modes: its trials, their tables, and private selections."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from dptune._aliases import canonical
from dptune._files import atomic_write
from dptune._validate import refuse
from dptune.ledger import LEDGER_NAME, Ledger
from utils.classification.mode_defaults import MODES
from utils.classification.outputs import SCORES_NAME
from utils.comparison.arguments import TrialArguments
from utils.comparison.outcomes import COMPARISON_NAME, PLOT_NAME, SETTINGS_NAME, Others, Outcome, comparison_section
from utils.comparison.plot import plot_modes
from utils.comparison.release import released
from utils.comparison.selection import planned_selection

TRIALS_FOLDER, TRIALS_NAME = "trials", "trials.jsonl"


def require_same_settings(folder: Path, training: TrialArguments, extra: Sequence[str]) -> None:
    """Record the settings that all trials in the folder share, except the data set; refuse other settings later.

    Raises:
        InvalidArgument: the trials in the folder have other settings.
    """
    settings = asdict(training) | {"trainer": list(extra)}
    del settings["output_dir"], settings["datasets"]
    path = folder / SETTINGS_NAME
    if path.exists():
        names = canonical([TrialArguments])  # the file may be of a version with other names
        for saved, before in json.loads(path.read_text()).items():
            name = names.get(saved, saved)
            if settings.get(name) != before:
                remedy = f"the trials in {folder} have {before!r}; give that, or another --output_dir"
                refuse(f"--{name}", settings.get(name), remedy)
        return
    with atomic_write(path) as file:
        file.write(json.dumps(settings, indent=2, allow_nan=False) + "\n")


def finished_trials(folder: Path) -> dict[str, list[Outcome]]:
    """All finished trials in a folder, by data set. Each was looked at, so each costs privacy."""
    by_dataset: dict[str, list[Outcome]] = {}
    for path in sorted((folder / TRIALS_FOLDER).glob(f"*/*/*/{SCORES_NAME}")):
        outcome = Outcome.of(json.loads(path.read_text()), path.with_name(LEDGER_NAME))
        by_dataset.setdefault(outcome.dataset, []).append(outcome)
    for outcomes in by_dataset.values():
        outcomes.sort(key=lambda one: (MODES.index(one.mode), not one.private, one.learning_rate, one.seed))
    return by_dataset


def spent_besides(folder: Path, dataset: str) -> Others:
    """What unfinished trials and private selections, finished or not, spent on a data set."""
    unfinished = []
    for path in sorted((folder / TRIALS_FOLDER / dataset).glob(f"*/{dataset}/{LEDGER_NAME}")):
        if not path.with_name(SCORES_NAME).exists() and (spends := Ledger(path).spends):
            unfinished.append((path.parents[1].name.partition("_lr")[0], tuple(spends)))
    plan = planned_selection(secret_folder(folder, dataset))
    if plan is None and (release := released(release_folder(folder, dataset))) is not None:
        plan = release.plan
    return Others(unfinished, None if plan is None else (plan["epsilon"], plan["delta"]))


def secret_folder(folder: Path, dataset: str) -> Path:
    """The folder of a private selection's trials until it ends."""
    return folder / f".secret-{dataset}"


def release_folder(folder: Path, dataset: str) -> Path:
    """The folder of a private selection's winner."""
    return folder / "selected" / dataset


def write_comparison(folder: Path, by_dataset: Mapping[str, Sequence[Outcome]]) -> None:
    """Write the table, the plot and a file with one line per trial."""
    warning = "NOT PRIVATE if the validation data are private: the scores are exact."
    head = ["# Fine-tuning modes compared", "", warning, ""]
    with atomic_write(folder / COMPARISON_NAME) as file:
        parts = (comparison_section(outcomes, spent_besides(folder, name)) for name, outcomes in by_dataset.items())
        file.write("\n".join([*head, *parts]))
    with atomic_write(folder / TRIALS_NAME) as file:
        file.writelines(f"{one.as_line()}\n" for outcomes in by_dataset.values() for one in outcomes)
    plot_modes(folder / PLOT_NAME, by_dataset)
