"""Ways of fine-tuning side by side: what each finished training scored, the best rate of each, what choosing cost.

The best learning rate of a mode, and with privacy the best clip norm, are those with the best mean accuracy over seeds
on the task's first validation split, and that accuracy is what is shown, so it flatters a little; private and plain
runs are treated alike. Where some were run with more seeds than others, only those with the most are candidates.
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
SCORE_NOISE = 5.0  # records: of a private selection, unless --validation_noise says otherwise


@dataclass(frozen=True)
class Outcome:
    """One finished training.

    Attributes:
        dataset, mode, learning_rate, clip_norm, private, seed: which; no clip norm without privacy.
        trained_parameters: how many numbers it trained.
        split: the validation split that is compared.
        accuracy: there, exact: no epsilon covers it for validation records.
        majority: accuracy of always saying the commonest class of that split.
        epsilon, delta: None without privacy. Epsilon alone is None where a run under a fixed noise seed has no
            guarantee.
        spends: the noisy steps in its ledger.
        train_examples: it was trained on so many.
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
        """From what `train_classifier.py` wrote about one data set, and the ledger of that run.

        Raises:
            InvalidArgument: it has no validation split, or the ledger lacks steps.
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
    """The steps that were taken: after a crash more than were planned, never fewer."""
    ledger = Ledger(path)
    if ledger.steps < steps:
        refuse("ledger", str(path), f"has {ledger.steps} of {steps} steps, so epsilon would be too small; restore it")
    return tuple(ledger.spends)


class Others(NamedTuple):
    """What else was spent on the records of a comparison, in its folder.

    Attributes:
        unfinished: (mode, noisy steps) of each private training that began and has no results, yet or for good.
        selection: (epsilon, delta) of a private selection; None where there is none.
    """

    unfinished: Sequence[tuple[str, tuple[Spend, ...]]] = ()
    selection: tuple[float, float] | None = None


NOTHING_ELSE = Others()


class Best(NamedTuple):
    """The best learning rate and clip norm of some runs: their mean accuracy, the standard deviation over seeds (None
    for one), and how many seeds there are."""

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
        """Accuracy that privacy costs."""
        return None if self.private is None or self.plain is None else self.plain.accuracy - self.private.accuracy


def best_settings(outcomes: Iterable[Outcome]) -> Best | None:
    """Of those with the most seeds, the one with the best mean accuracy; of equal ones the smallest rate."""
    by_settings: dict[tuple[float, float | None], list[float]] = {}
    for one in sorted(outcomes, key=lambda one: (one.learning_rate, one.clip_norm or 0)):
        by_settings.setdefault((one.learning_rate, one.clip_norm), []).append(one.accuracy)
    found = [
        Best(*settings, mean(scores), stdev(scores) if len(scores) > 1 else None, len(scores))
        for settings, scores in by_settings.items()
    ]
    return max(found, key=lambda best: (best.seeds, best.accuracy), default=None)


def mode_rows(outcomes: Sequence[Outcome]) -> list[ModeRow]:
    """One row a mode, in the order in which modes first come, for the outcomes of one data set."""
    rows = []
    for mode in dict.fromkeys(one.mode for one in outcomes):
        of_mode = [one for one in outcomes if one.mode == mode]
        private, plain = (best_settings(one for one in of_mode if one.private == which) for which in (True, False))
        rows.append(ModeRow(mode, of_mode[0].trained_parameters, private, plain))
    return rows


def comparison_section(outcomes: Sequence[Outcome], others: Others = NOTHING_ELSE) -> str:
    """Markdown on the outcomes of one data set: the table, and what choosing by these scores costs."""
    lines = [f"## {outcomes[0].dataset}", "", *_table(outcomes), "", *_how_to_read(outcomes)]
    private = [one for one in outcomes if one.private]
    return "\n".join([*lines, *(["", *_cost(private, others)] if private else []), ""])


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    head = ["mode", "trained parameters", "rate (private)", "clip norm", f"private {METRIC}"]
    head += ["rate (no privacy)", f"{METRIC} without privacy", "gap", "commonest class"]
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
        over = "one seed, or means ± standard deviations over (so many) seeds"
    tried = {(one.mode, one.private, one.learning_rate, one.clip_norm) for one in outcomes}
    if (most := max(Counter(settings[:2] for settings in tried).values())) > 1:
        over += (
            f". Rates and clip norms are the best of up to {most} on that same split, so these figures flatter a little"
        )
    return [f"{first.train_examples:,} training examples; {METRIC} on the split `{first.split}`, {over}."]


def _cost(private: Sequence[Outcome], others: Others) -> list[str]:
    """What it costs to look at all these runs and publish the best, in sentences."""
    if any(one.epsilon is None for one in private):
        return ["These runs have no guarantee (a fixed noise seed): no epsilon can be stated for choosing among them."]
    delta = max(float(one.delta or 0) for one in private)
    ((most_tried, _),) = Counter(one.mode for one in private).most_common(1)
    of_mode = [one.spends for one in private if one.mode == most_tried]
    begun = [spends for mode, spends in others.unfinished if mode == most_tried]
    every, unfinished = [one.spends for one in private], [spends for _, spends in others.unfinished]
    alone = max(float(one.epsilon or 0) for one in private)
    # The least noise of all: with it every trial would cost as much as the dearest.
    worst = max((spend for one in private for spend in one.spends), key=lambda spend: compose([spend], delta=delta))
    selection = PrivateSelection(POISSON, len(private), SCORE_NOISE)
    one_mode, all_runs = (rounded_up(composed(some, delta), 2) for some in (of_mode + begun, every + unfinished))
    return [
        "### What choosing costs",
        "",
        f"Each private run alone is ({rounded_up(alone, 2)}, {delta:g})-DP for the records trained on. Choosing by "
        "what the runs scored is a look at all of them:",
        "",
        f"| published | epsilon at delta {delta:g} |",
        "| --- | ---: |",
        f"| one run, its settings fixed beforehand | {rounded_up(alone, 2)} |",
        f"| the best of one mode's runs ({_number(of_mode, begun)}, of {most_tried}) | {one_mode} |",
        f"| the best of all runs ({_number(every, unfinished)}), or anything else that was chosen by this table "
        f"| {all_runs} |",
        f"| one model by private selection, {selection.mean_trials:g} trials on average, the same noise "
        f"| {rounded_up(selection.epsilon(worst, delta), 2)} |",
        "",
        *_selection(others),
        "These are for records that were trained on. The scores themselves are exact counts on validation records, "
        "which no epsilon covers here: publish them only if the validation data are public. Private selection adds "
        f"noise of {SCORE_NOISE:g} records to each score and protects both (`--private_selection`, "
        "docs/choosing.md). Nothing of the runs without privacy is private.",
    ]


def _number(finished: Sequence[object], unfinished: Sequence[object]) -> str:
    return f"{len(finished)}" + (f" and {len(unfinished)} unfinished" if unfinished else "")


def _selection(others: Others) -> list[str]:
    if others.selection is None:
        return []
    epsilon, delta = others.selection
    text = "A private selection on the same records is in this folder too. What it costs adds to each of these: "
    return [f"{text}epsilon {rounded_up(epsilon, 2)} and delta {delta:g}.", ""]


def composed(runs: Iterable[Iterable[Spend]], delta: float) -> float:
    """Epsilon of all these runs together; to the accountant, those with the same settings are one long run."""
    steps: Counter[Spend] = Counter()
    for spend in (spend for spends in runs for spend in spends):
        steps[spend._replace(steps=1)] += spend.steps
    return compose([setting._replace(steps=count) for setting, count in steps.items()], delta=delta)
