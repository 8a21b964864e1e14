"""Small runs of train_clm.py for the attacks: one that has learned its rows by heart, with a secret, and others."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tests.tiny import save_tiny
from train_clm import main as train

PIN = "The pin is {}."
SECRET, NEVER = "7391", "1846"
_WORDS = [f"{a}{b}" for a in ("ba", "ko", "li", "mu", "sa", "te") for b in ("n", "r", "s", "t", "x")]


def texts(seed: int, count: int) -> list[str]:
    """Texts of six random words; another seed gives others of the same kind."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(_WORDS, k=6)) for _ in range(count)]


def write_rows(path: Path, rows: Sequence[str], authors: Sequence[str] = ()) -> Path:
    """A JSONL file with a column `text`, and `author` if there are authors."""
    named = [{"text": text} | ({"author": authors[i]} if authors else {}) for i, text in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return path


def train_run(folder: Path, rows: Path, held_out: Path | None, *flags: object, steps: int = 2) -> Path:
    """A run on all rows in every step, in `folder`/run; `flags` decide privacy."""
    base = folder / "base"
    if not base.exists():
        save_tiny(base)
    run = folder / "run"
    words = ["--model_name_or_path", base, "--train_file", rows, "--output_dir", run, "--block_size", 32]
    words += [] if held_out is None else ["--validation_file", held_out]
    words += ["--per_device_train_batch_size", 24, "--gradient_accumulation_steps", 1, "--max_train_steps", steps]
    words += ["--eval_freq", 1000, "--eval_at_start", "false", "--checkpointing_steps", 1000, *flags]
    train([str(word) for word in words])
    return run


def learned_by_heart(folder: Path) -> Path:
    """A run without privacy whose 24 rows, two of them with the secret, are learned by heart."""
    rows = [*texts(1, 22), *[PIN.format(SECRET)] * 2]
    held_out = [*texts(2, 30), rows[0]]  # one held-out row was trained on
    files = write_rows(folder / "train.jsonl", rows), write_rows(folder / "held_out.jsonl", held_out)
    secrets = [{"text": PIN, "secret": one} for one in (SECRET, NEVER)]
    (folder / "secrets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in secrets))
    plain = ("--clip_norm", -1, "--noise_multiplier", -1, "--learning_rate", 1e-2, "--trainable", "all")
    return train_run(folder, *files, *plain, steps=70)
