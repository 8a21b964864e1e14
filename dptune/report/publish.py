"""The folder of a run that may be published: trained weights, report, plot of epsilon, model card, ledger."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dptune._files import write_folder
from dptune.accounting import Spend, compose
from dptune.ledger import LEDGER_NAME, Ledger
from dptune.published import PUBLISH_NAME, SETTINGS_NAME
from dptune.report.card import Artifact, write_model_card
from dptune.report.checksums import write_checksums
from dptune.report.fields import NO_FIELDS, CardFields
from dptune.report.plots import plot_epsilon
from dptune.report.statement import REPORT_NAME, PrivacyStatement, write_privacy_report

EPSILON_PLOT = "epsilon.png"
CARD_NAME = "README.md"

_CURVE_POINTS = 20
COMPLETED_BY_PEOPLE = (CARD_NAME, "adapter_config.json", "adapter/adapter_config.json")


def publish(
    run_folder: Path,
    statement: PrivacyStatement,
    save: Callable[[Path], None],
    *,
    ledger: Ledger | None,
    base_model: str,
    artifact: Artifact,
    card: CardFields = NO_FIELDS,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Make the folder `publish` of a finished run, whole or not at all. It replaces that of an earlier end of the run.

    A run without a guarantee gets no plot, and its report and card say that there is none.

    Args:
        run_folder: the run's folder, which must exist.
        statement: the run's guarantee.
        save: writes the trained weights and what belongs to them to the folder that it is given.
        ledger: the run's ledger, of which the folder gets a copy; None without privacy.
        base_model, artifact, card: see `write_model_card`.
        settings: publishable settings that a reader of the weights needs, JSON values by name.

    Returns:
        The folder.
    """

    def write(folder: Path) -> None:
        save(folder)
        if ledger is not None:
            (folder / LEDGER_NAME).write_bytes(ledger.content())
        if settings:
            text = json.dumps(settings, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            (folder / SETTINGS_NAME).write_text(text, encoding="utf-8")
        write_privacy_report(folder / REPORT_NAME, statement)
        plot = EPSILON_PLOT if _plot_curve(folder / EPSILON_PLOT, statement, ledger) else None
        name = folder / CARD_NAME
        write_model_card(name, statement, base_model=base_model, epsilon_plot=plot, artifact=artifact, fields=card)
        write_checksums(folder, but=COMPLETED_BY_PEOPLE)

    if ledger is not None and statement.unused_steps:
        ledger.count_unused(statement.unused_steps)
    for leftover in run_folder.glob(f".{PUBLISH_NAME}.*.tmp"):  # of a run that was killed here
        shutil.rmtree(leftover)
    target = run_folder / PUBLISH_NAME
    write_folder(target, write)
    return target


def _plot_curve(path: Path, statement: PrivacyStatement, ledger: Ledger | None) -> bool:
    """Draw epsilon by step, if the run has one. Returns whether it has."""
    delta = statement.delta
    if statement.epsilon is None or delta is None:
        return False
    steps = sorted({round(step) for step in np.linspace(1, statement.steps + statement.unused_steps, _CURVE_POINTS)})
    epsilons = [compose(_spends_until(step, statement, ledger), delta=delta) for step in steps]
    plot_epsilon(path, steps, epsilons, statement)
    return True


def _spends_until(step: int, statement: PrivacyStatement, ledger: Ledger | None) -> list[Spend]:
    """What the run cost up to a step. With noise bands this depends on where its launches ended."""
    if ledger is None or statement.noise_bands == 1:
        return [statement.spend(step)]
    return ledger.spends_of_first(step) if step <= ledger.steps else ledger.spends_after(step - ledger.steps)
