"""Writes the runs of studies as the CSV that `benchmarks.fit_planner` reads, one line per run.

    python -m benchmarks.quality benchmarks/studies/planner.yaml --runs A.jsonl --set ...
    python -m benchmarks.quality benchmarks/studies/planner_correlated.yaml --runs B.jsonl --set ...
    python -m benchmarks.planner_runs A.jsonl B.jsonl --model stories260K --trained 260032 --output NAME.csv

The noise over the batch of a run is that of its sums over steps (`dptune.run.noise_ratios.noise_batch_ratio`).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fit_planner import COLUMNS
from dptune._files import atomic_write
from dptune._validate import InvalidArgument, refuse
from dptune.bands import best_bands
from dptune.run.noise_ratios import error_ratio


def planner_rows(runs: Iterable[dict[str, Any]], *, model: str, trained: int) -> Iterator[dict[str, object]]:
    """A row of `fit_planner.COLUMNS` for each run, in the order of the runs.

    Args:
        runs: lines of a file that `benchmarks.quality` wrote.
        model: the model's name.
        trained: number of trained parameters.

    Raises:
        InvalidArgument: a run had no noise, or no held-out loss.
    """
    for run in runs:
        flags = json.loads(run["key"])["flags"] | run["chosen"]
        if not run["noise_multiplier"] or run["loss"] is None or run["loss_start"] is None:
            refuse("runs", run["contender"], "needs noise and a held-out loss before and after training")
        steps, bands = run["steps"], run["noise_bands"]
        ratio = run["noise_multiplier"] * error_ratio(best_bands(bands, steps), steps) / run["expected_batch_size"]
        values = (
            model,
            trained,
            flags["block_size"],
            steps,
            f"{ratio:.4g}",
            bands,
            f"{flags['learning_rate']:g}",
            run["seed"],
            f"{run['loss_start']:.4f}",
            f"{run['loss']:.4f}",
        )
        yield dict(zip(COLUMNS, values, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="JSONL files of `benchmarks.quality`")
    parser.add_argument("--model", required=True, help="name of the model, for the CSV")
    parser.add_argument("--trained", type=int, required=True, help="number of trained parameters")
    parser.add_argument("--output", required=True, help="CSV file to write")
    given = parser.parse_args(argv)
    runs = [json.loads(line) for name in given.runs for line in Path(name).read_text(encoding="utf-8").splitlines()]
    try:
        rows = list(planner_rows(runs, model=given.model, trained=given.trained))
    except InvalidArgument as error:
        parser.error(str(error))
    with atomic_write(given.output) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
