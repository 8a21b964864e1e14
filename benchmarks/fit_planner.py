"""Fit the planner's rule to measured runs: how the loss depends on steps and noise, and which learning rate is best.

    python -m benchmarks.fit_planner benchmarks/results/NAME.csv --parameters 260000 --source "a Llama of ..." \
        --rule utils/planning/rule.json --output benchmarks/results/NAME.md

The CSV has one line per run, with the columns of `COLUMNS`; `trained` is the number of trained parameters. All runs
train the same model. For each number of steps, noise and number of bands, the least loss of the tried rates counts,
averaged over seeds. The best rate is where a parabola through it and its neighbours is least. The form of the rule is
in `utils/planning/rule.py`. The fit is by least squares. To see how far it can be trusted, it is repeated without each
point in turn, and compared with the point that was left out.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.tables import machine, markdown, publish
from dptune._validate import InvalidArgument, refuse
from utils.planning.rule import Rule, write_rule

COLUMNS = (
    "model",
    "trained",
    "rows_tokens",
    "steps",
    "noise_batch_ratio",
    "bands",
    "rate",
    "seed",
    "loss_start",
    "loss_end",
)
_SAME = ("model", "trained", "rows_tokens")
_PARAMETERS = 6  # of the rule for the loss
_STARTS = ((0.0, 4.0), (-0.5, 0.2))  # of log noise and beta: the loss has several valleys


class Point(NamedTuple):
    """The best rate of a setting: its loss, averaged over seeds.

    Attributes:
        steps, ratio, bands: the setting; the noise over the batch is `ratio`.
        rate: the best learning rate, between the best of the tried ones and its neighbours.
        loss: held-out loss at the end, in nats per token, of the best of the tried ones.
        at_edge: whether a rate beyond it was not tried, so that the best may lie there.
    """

    steps: int
    ratio: float
    bands: int
    rate: float
    loss: float
    at_edge: bool


def read_runs(path: str | Path) -> list[dict[str, str]]:
    """The runs of a CSV.

    Raises:
        InvalidArgument: columns are missing, runs are of several models, or there are no runs.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        runs = list(csv.DictReader(file))
    if not runs or (missing := [one for one in COLUMNS if one not in runs[0]]):
        refuse("runs", str(path), f"lacks {', '.join(missing) if runs else 'runs'}; see the program's docstring")
    for name in _SAME:
        if len(found := sorted({run[name] for run in runs})) > 1:
            refuse("runs", str(path), f"has several values of {name} ({', '.join(found)}); give a file for each")
    return runs


def best_points(runs: Sequence[dict[str, str]]) -> list[Point]:
    """The best rate of each setting, by steps and noise."""
    losses: dict[tuple[int, float, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        setting = int(run["steps"]), float(f"{float(run['noise_batch_ratio']):.3g}"), int(run["bands"])
        losses[setting][float(run["rate"])].append(float(run["loss_end"]))
    found = []
    for setting, by_rate in sorted(losses.items()):
        means = {rate: float(np.mean(values)) for rate, values in by_rate.items()}
        best = min(means, key=means.__getitem__)
        at_edge = best in (min(means), max(means))
        found.append(Point(*setting, best if at_edge else _least(means, best), means[best], at_edge))
    return found


def _least(losses: dict[float, float], best: float) -> float:
    """The rate where a parabola in its logarithm through the best of the tried rates and its neighbours is least."""
    rates = sorted(losses)
    near = rates[rates.index(best) - 1 : rates.index(best) + 2]
    square, slope, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    return math.exp(-slope / (2 * square)) if square > 0 else best


def fit_loss(points: Sequence[Point], start: float) -> np.ndarray:
    """(floor, log learn, alpha, log noise, beta, gamma) of the rule with the least squared error.

    Args:
        points: what to fit.
        start: loss before training.
    """
    from scipy.optimize import least_squares

    steps, ratios, losses = (np.array([getattr(one, name) for one in points]) for name in ("steps", "ratio", "loss"))
    low = float(losses.min())

    def errors(values: np.ndarray) -> np.ndarray:
        return _loss(values, start, steps, ratios) - losses

    bounds = tuple(zip((0.0, low), (-20, 20), (0.01, 3), (-30, 30), (-2, 2), (0.1, 4), strict=True))
    begins = [[0.5 * low, 1.5, 0.5, noise, beta, 0.6] for noise, beta in itertools.product(*_STARTS)]
    fits = [least_squares(errors, begin, bounds=bounds, x_scale="jac") for begin in begins]
    found: np.ndarray = min(fits, key=lambda one: one.cost).x
    return found


def _loss(values: np.ndarray, start: float, steps: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    floor, learn, alpha, noise, beta, gamma = values
    kept = 1 / (1 + (np.exp(noise) * ratios * steps**beta) ** gamma)
    found: np.ndarray = start - kept * (start - floor - np.exp(learn) * steps**-alpha)
    return found


def fit_rate(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """(c, by_noise, by_steps, by_bands) of the best rate, by least squares of logarithms.

    What does not vary in the runs has an exponent of 0.
    """
    columns = [np.log([getattr(one, name) for one in points]) for name in ("ratio", "steps", "bands")]
    centred = np.stack([one - one.mean() for one in columns], axis=1)
    rates = np.log([one.rate for one in points])
    slopes = np.linalg.lstsq(centred, rates - rates.mean(), rcond=1e-9)[0]
    constant = rates.mean() - sum(slope * one.mean() for slope, one in zip(slopes, columns, strict=True))
    return math.exp(constant), float(slopes[0]), float(slopes[1]), float(slopes[2])


def left_out_errors(points: Sequence[Point], start: float) -> list[float]:
    """For each point, the error of the rule that was fitted to the others, in nats per token."""
    found = []
    for place, one in enumerate(points):
        values = fit_loss([*points[:place], *points[place + 1 :]], start)
        found.append(float(_loss(values, start, np.array([one.steps]), np.array([one.ratio]))[0] - one.loss))
    return found


def fit_rule(runs: Sequence[dict[str, str]], *, source: str, data: str, parameters: int) -> tuple[Rule, list[Point]]:
    """The rule, and the points that it was fitted to.

    Args:
        runs: see `read_runs`.
        source, data, parameters: see `Rule`.

    Raises:
        InvalidArgument: fewer settings than the rule has parameters, with one left out.
    """
    points = best_points(runs)
    if len(points) < _PARAMETERS + 2:
        refuse("runs", len(points), f"settings are too few; measure at least {_PARAMETERS + 2}")
    start = float(np.mean([float(run["loss_start"]) for run in runs]))
    floor, learn, alpha, noise, beta, gamma = fit_loss(points, start).tolist()
    errors = left_out_errors(points, start)
    rule = Rule(
        source=source,
        data=data,
        parameters=parameters,
        whole=int(runs[0]["trained"]) == parameters,
        start=start,
        floor=floor,
        learn=math.exp(learn),
        alpha=alpha,
        noise=math.exp(noise),
        beta=beta,
        gamma=gamma,
        rate=fit_rate(points),
        steps=(min(one.steps for one in points), max(one.steps for one in points)),
        ratios=(min(one.ratio for one in points), max(one.ratio for one in points)),
        bands=max(one.bands for one in points),
        error=float(np.sqrt(np.mean(np.square(errors)))),
    )
    return rule, points


def page(rule: Rule, points: Sequence[Point], errors: Sequence[float]) -> list[str]:
    """The fit and its errors, as parts of a Markdown page."""
    factor, by_noise, by_steps, by_bands = rule.rate
    rows = [
        (
            f"{one.steps}",
            f"{one.ratio:.3g}",
            f"{one.bands}",
            f"{one.loss:.3f}",
            f"{rule.loss(one.steps, one.ratio):.3f}",
            f"{error:+.3f}",
            f"{one.rate:.2g}{' (edge)' if one.at_edge else ''}",
            f"{rule.learning_rate(one.steps, one.ratio, one.bands):.2g}",
        )
        for one, error in zip(points, errors, strict=True)
    ]
    head = ["steps", "noise over batch", "bands", "loss", "by the rule", "left out", "best rate", "rate by the rule"]
    return [
        f"Data: `{rule.data}`.\n{textwrap.fill(f'Runs: {rule.source}.', 100)}",
        f"    loss = {rule.start:.3f} - kept ({rule.start:.3f} - {rule.floor:.3f} - {rule.learn:.3g}"
        f" T^-{rule.alpha:.3f})\n"
        f"    kept = 1 / (1 + ({rule.noise:.3g} r T^{rule.beta:.3f})^{rule.gamma:.3f})\n"
        f"    rate = {factor:.3g} r^{by_noise:.3f} T^{by_steps:.3f} bands^{by_bands:.3f}",
        f"T is the number of steps, r the noise over the batch. Before training the loss is {rule.start:.3f}.\n"
        f"A point that was left out of the fit is missed by {rule.error:.3f} nats per token (root mean square):\n"
        "the column `left out` has the error of each. `edge`: the best of the tried rates was the smallest\n"
        "or the largest one. A floor near 0 says that the runs are too short to show one.",
        markdown(head, rows),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Fit, write the rule and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="CSV of the measured runs")
    parser.add_argument("--source", required=True, help="the model, what was trained and how, in words")
    parser.add_argument("--parameters", type=int, required=True, help="number of the model's parameters")
    parser.add_argument("--rule", help="JSON file to write the rule to; default: none")
    parser.add_argument("--output", help="Markdown file to write; default: none")
    given = parser.parse_args(argv)
    try:
        runs = read_runs(given.runs)
        rule, points = fit_rule(runs, source=given.source, data=given.runs, parameters=given.parameters)
    except InvalidArgument as error:
        parser.error(str(error))
    if given.rule is not None:
        write_rule(given.rule, rule)
    device = torch.device("cpu")
    parts = [
        "# The planner's rule, fitted",
        machine("benchmarks.fit_planner", device, sys.argv[1:] if argv is None else argv),
        *page(rule, points, left_out_errors(points, rule.start)),
    ]
    publish(parts, given.output)


if __name__ == "__main__":
    main()
