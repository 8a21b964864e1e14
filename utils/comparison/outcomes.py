"""Fine-tuning modes side by side: scores of finished trainings, best settings of each mode, the cost of choosing.

The best learning rate (and clip norm, with privacy) has the best mean accuracy over seeds on the task's first
validation split. That accuracy is also the one shown, so it is slightly optimistic, for private and plain runs alike.
If settings ran with different numbers of seeds, only those with the most seeds are candidates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from dptune._validate import refuse
from dptune.accounting import Spend, compose
from dptune.accounting.rounding import rounded_up
from dptune.accounting.selection import POISSON, PrivateSelection
from dptune.ledger import Ledger
from utils.comparison.trials import TrialResults

COMPARISON_NAME, PLOT_NAME, SETTINGS_NAME = "comparison.md", "comparison.png", "settings.json"  # in its folder
METRIC = "accuracy"
SCORE_NOISE = 5.0  # in records: noise of a private selection, unless --validation_noise is given


@dataclass(frozen=True)
class Outcome:
    """One finished training.

    Attributes:
        dataset, mode, learning_rate, clip_norm, private, seed: its settings; no clip norm without privacy.
        trained_parameters: number of trained parameters.
        split: the validation split that is compared.
        accuracy: exact accuracy on that split; no epsilon covers it for validation records.
        majority: accuracy of always predicting the majority class of that split.
        epsilon, delta: None without privacy. Epsilon alone is None if a fixed noise seed voids the guarantee.
        spends: the noisy steps in its ledger.
        train_examples: number of training examples.
        scores: by split and metric.
    """

    dataset: str
    mode: str
    learning_rate: float
    clip_norm: float | None
    private: bool
    seed: int
    trained_parameters: int
    split: str
    accuracy: float
    majority: float
    epsilon: float | None
    delta: float | None
    spends: tuple[Spend, ...]
    train_examples: int
    scores: dict[str, dict[str, float]]

    @classmethod
    def of(cls, results: TrialResults, ledger: Path) -> Outcome:
        """The outcome from a run's `results.json` and ledger.

        Raises:
            InvalidArgument: there is no validation split, or the ledger lacks steps.
        """
        if not results["scores"]:
            refuse("scores", {}, f"{results['task']} has no validation split to compare on")
        split = next(iter(results["scores"]))
        private = results["private"]
        return cls(
            dataset=results["task"],
            mode=results["mode"],
            learning_rate=results["learning_rate"],
            clip_norm=results["clip_norm"] if private else None,
            private=private,
            seed=results["seed"],
            trained_parameters=results["trained_parameters"],
            split=split,
            accuracy=results["scores"][split][METRIC],
            majority=results["majority"][split],
            epsilon=results["epsilon"] if private else None,
            delta=results["delta"] if private else None,
            spends=_spends(ledger, results["steps"]) if private else (),
            train_examples=results["train_examples"],
            scores=results["scores"],
        )

    def as_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self) | {"spends": [spend._asdict() for spend in self.spends]})


def _spends(path: Path, steps: int) -> tuple[Spend, ...]:
    """The noisy steps taken: after a crash possibly more than planned, never fewer."""
    ledger = Ledger(path)
    if ledger.steps < steps:
        refuse("ledger", str(path), f"has {ledger.steps} of {steps} steps, so epsilon would be too small; restore it")
    return tuple(ledger.spends)


class Others(NamedTuple):
    """Other privacy costs on the same records in a comparison's folder.

    Attributes:
        unfinished: (mode, noisy steps) of each private training without results.
        selection: (epsilon, delta) of a private selection; None if there is none.
    """

    unfinished: Sequence[tuple[str, tuple[Spend, ...]]] = ()
    selection: tuple[float, float] | None = None


NOTHING_ELSE = Others()


class Best(NamedTuple):
    """The best learning rate and clip norm of some runs, with mean accuracy, number of seeds, and standard deviation
    over seeds (None for one seed)."""

    learning_rate: float
    clip_norm: float | None
    accuracy: float
    spread: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.accuracy:.3f}" + (f" ± {self.spread:.3f} ({self.seeds})" if self.spread is not None else "")


class ModeRow(NamedTuple):
    """One mode on one data set."""

    mode: str
    trained_parameters: int
    private: Best | None
    plain: Best | None

    @property
    def gap(self) -> float | None:
        """How much accuracy privacy costs."""
        return None if self.private is None or self.plain is None else self.plain.accuracy - self.private.accuracy


def best_settings(outcomes: Iterable[Outcome]) -> Best | None:
    """The settings with the best mean accuracy among those with the most seeds; of equal ones the smallest rate."""
    by_settings: dict[tuple[float, float | None], list[float]] = {}
    for one in sorted(outcomes, key=lambda one: (one.learning_rate, one.clip_norm or 0)):
        by_settings.setdefault((one.learning_rate, one.clip_norm), []).append(one.accuracy)
    found = [
        Best(*settings, mean(scores), stdev(scores) if len(scores) > 1 else None, len(scores))
        for settings, scores in by_settings.items()
    ]
    return max(found, key=lambda best: (best.seeds, best.accuracy), default=None)


def mode_rows(outcomes: Sequence[Outcome]) -> list[ModeRow]:
    """One row per mode, in the order of first appearance, for the outcomes of one data set."""
    rows = []
    for mode in dict.fromkeys(one.mode for one in outcomes):
        of_mode = [one for one in outcomes if one.mode == mode]
        private, plain = (best_settings(one for one in of_mode if one.private == which) for which in (True, False))
        rows.append(ModeRow(mode, of_mode[0].trained_parameters, private, plain))
    return rows


def comparison_section(outcomes: Sequence[Outcome], others: Others = NOTHING_ELSE) -> str:
    """Markdown for the outcomes of one data set: the table, and the privacy cost of choosing by these scores."""
    lines = [f"## {outcomes[0].dataset}", "", *_table(outcomes), "", *_how_to_read(outcomes)]
    private = [one for one in outcomes if one.private]
    return "\n".join([*lines, *(["", *_cost(private, others)] if private else []), ""])


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    head = ["mode", "trained parameters", "rate (private)", "clip norm", f"private {METRIC}"]
    head += ["rate (no privacy)", f"{METRIC} without privacy", "gap", "majority class"]
    majority = f"{outcomes[0].majority:.3f}"
    rows = [[*_cells(row), majority] for row in mode_rows(outcomes)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(row: ModeRow) -> list[str]:
    private, plain = row.private, row.plain
    return [
        row.mode,
        f"{row.trained_parameters:,}",
        *(["-"] * 3 if private is None else [f"{private.learning_rate:g}", f"{private.clip_norm:g}", str(private)]),
        *(["-"] * 2 if plain is None else [f"{plain.learning_rate:g}", str(plain)]),
        "-" if row.gap is None else f"{row.gap:+.3f}",
    ]


def _how_to_read(outcomes: Sequence[Outcome]) -> list[str]:
    first = outcomes[0]
    over = "one seed"
    if len({one.seed for one in outcomes}) > 1:
        over = "one seed, or mean ± standard deviation (number of seeds)"
    tried = {(one.mode, one.private, one.learning_rate, one.clip_norm) for one in outcomes}
    if (most := max(Counter(settings[:2] for settings in tried).values())) > 1:
        over += (
            f". Rates and clip norms are the best of up to {most} on that split, so accuracies are slightly optimistic"
        )
    return [f"{first.train_examples:,} training examples; {METRIC} on the split `{first.split}`, {over}."]


def _cost(private: Sequence[Outcome], others: Others) -> list[str]:
    """The privacy cost of looking at all these runs and publishing the best."""
    if any(one.epsilon is None for one in private):
        return [
            "Some runs have a fixed noise seed and no guarantee, so no epsilon can be stated for choosing among them."
        ]
    delta = max(float(one.delta or 0) for one in private)
    ((most_tried, _),) = Counter(one.mode for one in private).most_common(1)
    of_mode = [one.spends for one in private if one.mode == most_tried]
    begun = [spends for mode, spends in others.unfinished if mode == most_tried]
    every, unfinished = [one.spends for one in private], [spends for _, spends in others.unfinished]
    alone = max(float(one.epsilon or 0) for one in private)
    # The least noisy steps: with them every trial would cost as much as the most expensive run.
    worst = max((spend for one in private for spend in one.spends), key=lambda spend: compose([spend], delta=delta))
    selection = PrivateSelection(POISSON, len(private), SCORE_NOISE)
    one_mode, all_runs = (rounded_up(composed(some, delta), 2) for some in (of_mode + begun, every + unfinished))
    return [
        "### What choosing costs",
        "",
        f"Each private run alone is ({rounded_up(alone, 2)}, {delta:g})-DP for its training records. Choosing by "
        "score uses the output of all runs, so it costs more:",
        "",
        f"| published | epsilon at delta {delta:g} |",
        "| --- | ---: |",
        f"| one run whose settings were fixed beforehand | {rounded_up(alone, 2)} |",
        f"| the best of one mode's runs ({_number(of_mode, begun)}, of {most_tried}) | {one_mode} |",
        f"| the best of all runs ({_number(every, unfinished)}), or anything else chosen by this table | {all_runs} |",
        f"| one model by private selection, {selection.mean_trials:g} trials on average, the same noise "
        f"| {rounded_up(selection.epsilon(worst, delta), 2)} |",
        "",
        *_selection(others),
        "These epsilons are for training records. The scores are exact counts on validation records, which no epsilon "
        "covers here: publish them only if the validation data are public. Private selection adds noise of "
        f"{SCORE_NOISE:g} records to each score and protects both (`--private_selection`, docs/how_to/choosing.md). "
        "Runs without privacy protect nothing.",
    ]


def _number(finished: Sequence[object], unfinished: Sequence[object]) -> str:
    return f"{len(finished)}" + (f" and {len(unfinished)} unfinished" if unfinished else "")


def _selection(others: Others) -> list[str]:
    if others.selection is None:
        return []
    epsilon, delta = others.selection
    text = "This folder also holds a private selection on the same records. Add its cost to each row: "
    return [f"{text}epsilon {rounded_up(epsilon, 2)} and delta {delta:g}.", ""]


def composed(runs: Iterable[Iterable[Spend]], delta: float) -> float:
    """Epsilon of all these runs together. Runs with the same settings are accounted as one long run."""
    steps: Counter[Spend] = Counter()
    for spend in (spend for spends in runs for spend in spends):
        steps[spend._replace(steps=1)] += spend.steps
    return compose([setting._replace(steps=count) for setting, count in steps.items()], delta=delta)
