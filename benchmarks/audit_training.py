"""How often the audit of a training contradicts it, with the noise as stated and with less, by each adversary.

    python -m benchmarks.audit_training --model_name_or_path FOLDER --train_file ROWS.jsonl \\
        --output benchmarks/results/audit_training_HARDWARE_MODEL_DATE.md

Every trial trains once by `train_clm.py`, with canaries of random text and with dials, and audits it by
`python -m dptune.audit training`. Keys and coins are secret, so no trial can be repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.audit_faults import less_noise
from benchmarks.tables import machine, markdown, publish
from dptune.accounting.rounding import rounded_up
from utils.training.canaries import LOSS_SCORE
from utils.training.dials import DIAL_SCORE

NOISES = {"as stated": 1.0, "a quarter": 0.25, "none": 0.0}  # {name: factor of the noise}
ADVERSARIES = (LOSS_SCORE, DIAL_SCORE)
_DELTA = 1e-6


def main(argv: Sequence[str] | None = None) -> None:
    """Train and audit as often as asked, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder of a small causal language model")
    parser.add_argument("--train_file", required=True, help="JSONL file with a column `text`")
    parser.add_argument("--rows", type=int, default=100, help="rows to train on, besides the canaries")
    parser.add_argument("--canaries", type=int, default=200, help="rows of random text")
    parser.add_argument("--dials", type=int, default=1500, help="rows that turn a dial")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[3.0, 6.0], help="stated epsilons")
    parser.add_argument("--steps", type=int, default=20, help="steps of each training, which draw half of the rows")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of every training")
    parser.add_argument("--trials", type=int, default=3, help="trainings of each epsilon and noise")
    parser.add_argument("--output", help="Markdown file for the result; default: only print")
    args = parser.parse_args(argv)
    about = machine("benchmarks.audit_training", torch.device("cpu"), sys.argv[1:] if argv is None else argv)
    rows = []
    for epsilon in args.epsilons:
        for name, factor in NOISES.items():
            for _ in range(args.trials):
                with tempfile.TemporaryDirectory() as made:
                    rows.append(_row(epsilon, name, _trial(args, epsilon, factor, Path(made))))
    header = ["stated epsilon", "noise", *(f"{one}: bound (estimate)" for one in ADVERSARIES), "verdict"]
    publish(["# Audits of a training", about, _setting(args), markdown(header, rows)], args.output)


def _trial(args: argparse.Namespace, epsilon: float, factor: float, folder: Path) -> dict[str, Any]:
    """What the audit of one training found, as in its `audit.json`, with its exit status."""
    lines = Path(args.train_file).read_text(encoding="utf-8").splitlines()
    chosen = [{"text": json.loads(line)["text"]} for line in random.sample(lines, args.rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    run, total = folder / "run", args.rows + args.canaries + args.dials
    train = ["--model_name_or_path", args.model_name_or_path, "--train_file", str(folder / "rows.jsonl")]
    train += ["--output_dir", str(run), "--trainable", "all", "--block_size", "64", "--clip_norm", "1"]
    train += ["--target_epsilon", str(epsilon), "--delta", str(_DELTA), "--max_train_steps", str(args.steps)]
    train += ["--per_device_train_batch_size", str(total // 2), "--gradient_accumulation_steps", "1"]
    train += ["--max_tokens_per_device", "4096", "--learning_rate", str(args.learning_rate)]
    train += ["--checkpointing_steps", "0", "--eval_freq", str(args.steps)]
    train += ["--audit_canaries", str(args.canaries), "--audit_dials", str(args.dials)]
    with less_noise(factor):
        _run("train_clm", train)
    status = _run("dptune.audit", ["training", str(run)])
    found: dict[str, Any] = json.loads((run / "audit" / "training" / "audit.json").read_text(encoding="utf-8"))
    return found | {"status": status}


def _run(program: str, words: Sequence[str]) -> int:
    """Run a program as a user does, but in this process, where the noise may be less; returns its exit status."""
    with patch.object(sys, "argv", [program, *words]):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def _row(epsilon: float, noise: str, found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    values = {one["question"]: one["found"] for one in found["findings"]}
    bounds = []
    for adversary in ADVERSARIES:
        question = f"one training, {adversary}"
        bounds.append(f"{values[question]:.2f} ({values[f'{question}, if it acts like a Gaussian']:.2f})")
    verdict = "CONTRADICTED" if found["contradicted"] else "no contradiction"
    return [rounded_up(epsilon, trim=True), noise, *bounds, f"{verdict}, status {found['status']}"]


def _setting(args: argparse.Namespace) -> str:
    return (
        f"{args.rows} rows, {args.canaries} canaries of random text and {args.dials:,} dials train the whole model. "
        f"{args.steps} steps draw half of all rows each, learning rate {args.learning_rate:g}, at most 64 tokens of "
        f"each row, delta {_DELTA:g}. A line is one training. The bound assumes nothing; the estimate assumes a "
        "mechanism that acts like a Gaussian one. All findings of a line together are right with a probability of 0.95."
    )


if __name__ == "__main__":
    main()
