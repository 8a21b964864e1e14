"""How good models are at equal epsilon: trainings by `train_clm.py` or `train_classifier.py`, compared over seeds.

    python -m benchmarks.quality benchmarks/studies/NAME.yaml --runs RUNS.jsonl \\
        --set model_name_or_path=FOLDER --output benchmarks/results/NAME.md

A study is a YAML file:

    title, about: for the table
    program: train_clm (default) or train_classifier
    common: {flag: value}, for every training
    contenders: {name: {flag: value}}; the table compares each with the first
    grid: {flag: [values]}, tried with every contender that does not set the flag itself
    seeds: [0, 1, 2]

Each training is a line of RUNS.jsonl. Runs that are there are not done again, so a study that was stopped continues. A
seed fixes draws, noise and the start of adapters by --insecure_test_seed: these trainings protect nobody. An optimizer
of `benchmarks.tried` is named by `tried: NAME` among the flags.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
import yaml

from benchmarks.tables import machine, markdown, publish
from dptune._files import append_line

Flags = dict[str, Any]
_TRIED = "tried"


@dataclass(frozen=True)
class Training:
    """One training of a study.

    Attributes:
        contender: its name in the study.
        chosen: the flags of the grid.
        flags: all flags but the seed.
        seed: of draws, noise and adapters.
    """

    contender: str
    chosen: Flags
    flags: Flags
    seed: int

    @property
    def key(self) -> str:
        """What tells it from other trainings, without the paths of this machine."""
        told = {name: value for name, value in self.flags.items() if not _is_path(value)}
        return json.dumps({"flags": told, "seed": self.seed}, sort_keys=True)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and os.sep in value


def trainings_of(study: Mapping[str, Any], given: Mapping[str, Any]) -> list[Training]:
    """All trainings of a study.

    Args:
        study: the YAML file.
        given: flags of the command line, which replace those of the study.
    """
    found = []
    for contender, own in study["contenders"].items():
        grid = {name: values for name, values in study.get("grid", {}).items() if name not in own}
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            flags = {**study.get("common", {}), **own, **chosen, **given}
            found += [Training(contender, chosen, flags, seed) for seed in study["seeds"]]
    return found


def words_of(flags: Mapping[str, Any]) -> Iterator[str]:
    """Flags as words of a command line. A flag that is true stands alone, and one that is None is left out."""
    for name, value in flags.items():
        if value is None or name == _TRIED:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        yield from (f"--{name}", *map(str, values))


def perform(program: str, training: Training) -> dict[str, Any]:
    """Do one training in this process; returns its line of the file of runs."""
    from benchmarks.tried import optimizer_tried

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as made, optimizer_tried(training.flags.get(_TRIED)):
        seed = str(training.seed)
        fixed = ["--output_dir", made, "--seed", seed, "--insecure_test_seed", seed, "--checkpointing_steps", "0"]
        _run(program, [*words_of(training.flags), *fixed])
        return {
            "contender": training.contender,
            "chosen": training.chosen,
            "seed": training.seed,
            **_results(Path(made)),
            "seconds": round(time.perf_counter() - began, 1),
            "key": training.key,
        }


def _run(program: str, words: Sequence[str]) -> None:
    """Run a program as a user does, but in this process, where another optimizer may be tried."""
    with patch.object(sys, "argv", [program, *words]):
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _results(folder: Path) -> dict[str, Any]:
    """What a training found."""
    (found,) = folder.rglob("all_results.json")  # a task of GLUE has a folder of its own
    results, folder = json.loads(found.read_text(encoding="utf-8")), found.parent
    lines = (folder / "diagnostics.jsonl").read_text(encoding="utf-8").splitlines()
    report = json.loads((folder / "publish" / "privacy_report.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in lines[1:]]
    names = ("noise_multiplier", "noise_bands", "clip_norm", "expected_batch_size", "steps")
    kept = {name: report[name] for name in names if name in report}
    kept["losses"] = {one["step"]: round(one["eval_loss"], 4) for one in steps if "eval_loss" in one}
    kept["scores"] = next((one["scores"] for one in reversed(steps) if "scores" in one), None)
    return {"loss_start": results.get("eval_loss_before"), "loss": results.get("eval_loss"), **kept}


def done_in(runs: Path) -> dict[str, dict[str, Any]]:
    """The trainings in a file of runs, by key."""
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.is_file() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def score_of(line: Mapping[str, Any]) -> float:
    """What a training is judged by: the accuracy of a classifier, else the held-out loss."""
    if line["scores"]:
        return float(next(iter(line["scores"].values()))["accuracy"])
    return float(line["loss"])


def table(trainings: Sequence[Training], done: Mapping[str, dict[str, Any]]) -> str:
    """A row for each contender and point of the grid: its score over the seeds, and how it differs from the first.

    The difference is of equal seeds, with its standard error.
    """
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for one in trainings:
        if one.key in done:
            settings = ", ".join(f"{name} {value}" for name, value in one.chosen.items())
            rows.setdefault((one.contender, settings), {})[one.seed] = score_of(done[one.key])
    if not rows:
        return "No training is done."
    first = next(iter(rows.values()))
    lines = []
    for (contender, settings), scores in rows.items():
        seeds = sorted(scores.keys() & first.keys())
        apart = [scores[seed] - first[seed] for seed in seeds]
        error = f" ± {stdev(apart) / len(apart) ** 0.5:.3f}" if len(apart) > 1 else ""
        spread = f" ± {stdev(scores.values()):.3f}" if len(scores) > 1 else ""
        difference = "" if scores is first or not apart else f"{mean(apart):+.3f}{error}"
        each = ", ".join(f"{scores[seed]:.3f}" for seed in sorted(scores))
        lines.append([contender, settings, f"{mean(scores.values()):.3f}{spread}", difference, each])
    return markdown(["contender", "settings", "mean ± deviation", "against the first", "each seed"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Do the trainings that are not done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", help="YAML files")
    parser.add_argument("--runs", required=True, help="JSONL file of all trainings done")
    parser.add_argument("--set", nargs="*", default=[], metavar="FLAG=VALUE", help="flags for every training")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's")
    parser.add_argument("--output", help="Markdown file for the result; default: only print")
    args = parser.parse_args(argv)
    about = machine("benchmarks.quality", torch.device("cpu"), sys.argv[1:] if argv is None else argv)
    given = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in args.set)}
    parts = []
    for path in args.study:
        study = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        study |= {"seeds": args.seeds} if args.seeds else {}
        trainings = trainings_of(study, given)
        _do(study.get("program", "train_clm"), trainings, Path(args.runs), args.workers)
        parts += [f"## {study['title']}", study["about"], table(trainings, done_in(Path(args.runs)))]
    publish(["# Models at equal epsilon", about, *parts], args.output)


def _do(program: str, trainings: Sequence[Training], runs: Path, workers: int) -> None:
    """Do the trainings that are not in the file of runs, the seeds one after the other."""
    done = done_in(runs)
    left = {one.key: one for one in sorted(trainings, key=lambda one: one.seed) if one.key not in done}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(perform, program, one): one for one in left.values()}
        for number, future in enumerate(as_completed(waiting), 1):
            line = future.result()
            append_line(runs, json.dumps(line))
            print(f"{number} of {len(waiting)}: {line['contender']} {line['chosen']} {score_of(line):.4f}", flush=True)


if __name__ == "__main__":
    main()
