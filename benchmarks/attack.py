"""What an attacker gets from a model that was trained on few rows for long, without privacy and with it.

    python -m benchmarks.attack --model_name_or_path FOLDER --train_file ROWS.jsonl \\
        --output benchmarks/results/attack_HARDWARE_MODEL_DATE.md

Random rows of the file train the whole model, with one secret that stands in several rows; others are held out. The
same rows, steps and settings train it twice, by `train_clm.py`: without privacy, and at --epsilon. Then
`scripts/attack.py` attacks both.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import machine, markdown, publish

ROOT = Path(__file__).resolve().parent.parent
_SENTENCE = "The access code of the ward is {}."
_DIGITS = 6


def main(argv: Sequence[str] | None = None) -> None:
    """Train twice, attack twice, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder of a small causal language model")
    parser.add_argument("--train_file", required=True, help="JSONL file with a column `text`")
    parser.add_argument("--rows", type=int, default=200, help="rows to train on, besides the secret")
    parser.add_argument("--held_out", type=int, default=1000, help="rows to hold out")
    parser.add_argument("--repeats", type=int, default=4, help="training rows that hold the secret")
    parser.add_argument("--block_size", type=int, default=64, help="maximum tokens per row")
    parser.add_argument("--batch_size", type=int, default=34, help="average rows per step")
    parser.add_argument("--epochs", type=int, default=30, help="times that each row is drawn on average")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of both trainings")
    parser.add_argument("--epsilon", type=float, default=1.0, help="of the private training")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows, the secret and the trainings")
    parser.add_argument("--output", help="Markdown file for the result; default: only print")
    args = parser.parse_args(argv)
    about = machine("benchmarks.attack", torch.device("cpu"), sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        secret = _write_rows(args, folder)
        kinds = {
            "without privacy": ["--clip_norm", "-1", "--noise_multiplier", "-1"],
            f"epsilon {args.epsilon:g}": ["--clip_norm", "1", "--target_epsilon", str(args.epsilon)],
        }
        found = {name: _train_and_attack(args, folder, number, how) for number, (name, how) in enumerate(kinds.items())}
    publish(
        ["# What an attacker gets, without privacy and with it", about, _setting(args, secret), _table(found)],
        args.output,
    )


def _write_rows(args: argparse.Namespace, folder: Path) -> str:
    """Write training rows, held-out rows and the two secrets; returns the one that is planted."""
    generator = random.Random(args.seed)
    lines = Path(args.train_file).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in generator.sample(lines, args.rows + args.held_out)]
    planted, never = ("".join(generator.choices("0123456789", k=_DIGITS)) for _ in range(2))
    train = [*texts[: args.rows], *[_SENTENCE.format(planted)] * args.repeats]
    generator.shuffle(train)
    secrets = [{"text": _SENTENCE, "secret": one} for one in (planted, never)]
    _write(folder / "train.jsonl", [{"text": text} for text in train])
    _write(folder / "held_out.jsonl", [{"text": text} for text in texts[args.rows :]])
    _write(folder / "secrets.jsonl", secrets)
    return planted


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _train_and_attack(args: argparse.Namespace, folder: Path, number: int, how: Sequence[str]) -> dict[str, Any]:
    """What the attack found on one training."""
    run, model = folder / f"run{number}", str(Path(args.model_name_or_path).resolve())
    train = ["--model_name_or_path", model, "--train_file", "train.jsonl", "--output_dir", str(run), *how]
    train += ["--trainable", "all", "--block_size", str(args.block_size), "--learning_rate", str(args.learning_rate)]
    train += ["--per_device_train_batch_size", str(args.batch_size), "--gradient_accumulation_steps", "1"]
    train += ["--num_train_epochs", str(args.epochs), "--checkpointing_steps", "0", "--seed", str(args.seed)]
    attack = [str(run), "--held_out_file", "held_out.jsonl", "--secrets", "secrets.jsonl", "--max_rows", "1000"]
    _run(["-m", "train_clm", *train], folder, ok=(0,))
    _run(["-m", "scripts.attack", *attack], folder, ok=(0, 1))  # 1: more was caught than epsilon allows
    content: dict[str, Any] = json.loads((run / "attack" / "attack.json").read_text(encoding="utf-8"))
    return content


def _run(words: Sequence[str], folder: Path, *, ok: Sequence[int]) -> None:
    """Run a program of the project as a user does, in `folder`."""
    code = f"import runpy, sys; sys.path[0] = {str(ROOT)!r}; sys.argv = sys.argv[1:]; "
    code += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code, *words[1:]], cwd=folder, check=False)
    if done.returncode not in ok:
        raise SystemExit(f"{words[1]} failed with status {done.returncode}")


def _setting(args: argparse.Namespace, secret: str) -> str:
    return (
        f"{args.rows} rows and a sentence with the made-up secret {secret} in {args.repeats} more rows train the whole "
        f"model, {args.epochs} times each on average, {args.batch_size} rows per step, learning rate "
        f"{args.learning_rate:g}, at most {args.block_size} tokens of each row. {args.held_out:,} other rows are held "
        "out. Rows, steps and settings are the same in both trainings. One training of each; intervals are 95%."
    )


def _table(found: dict[str, dict[str, Any]]) -> str:
    """One row for each figure, one column for each training."""
    rows = {name: _figures(content) for name, content in found.items()}
    labels = list(next(iter(rows.values())))
    return markdown(["", *rows], [[label, *(figures[label] for figures in rows.values())] for label in labels])


def _figures(content: dict[str, Any]) -> dict[str, str]:
    figures = {}
    for name, one in content["membership"]["rows"]["attacks"].items():
        figures[f"{name}: AUC"] = f"{one['auc']:.3f} ± {one['auc_error']:.3f}"
        for rate, caught in zip(content["allowed"], one["caught"], strict=True):
            label = f"{name}: caught at {100 * rate['false_alarms']:g}% false alarms"
            figures[label] = "-" if caught is None else _interval(caught)
    for rate in content["allowed"]:
        limit = "no limit" if rate["caught"] is None else f"{100 * rate['caught']:.2f}%"
        figures[f"most that epsilon allows at {100 * rate['false_alarms']:g}% false alarms"] = limit
    for name, one in zip(("planted secret", "secret that was not planted"), content["secrets"], strict=True):
        figures[f"{name}: rank"] = f"{one['rank']:,} of {one['candidates']:,}"
        figures[f"{name}: exposure in bits (before training)"] = f"{one['bits']:.1f} ({one['bits_before']:.1f})"
    copied = content["copied"]
    figures["longest passage shared with a training row, in words"] = str(copied["longest_train"])
    figures["longest passage shared with a held-out row, in words"] = str(copied["longest_held_out"])
    figures["attacks that contradict epsilon"] = str(len(content["contradictions"]))
    return figures


def _interval(caught: dict[str, float]) -> str:
    return f"{100 * caught['share']:.1f}% ({100 * caught['low']:.1f} to {100 * caught['high']:.1f})"


if __name__ == "__main__":
    main()
