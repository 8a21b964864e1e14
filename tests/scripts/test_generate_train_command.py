"""The training jobs: the line that is printed, its noise, the budget, what is refused, and one job run to its end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from dptune._validate import InvalidArgument
from dptune.accounting import epsilon
from dptune.budget import Budget
from scripts import generate_train_command as job
from train_clm import GROUPS
from utils.arguments import parse
from utils.jsonl import write_jsonl
from utils.launch_lines import PLAIN_CONFIG, SHARDED_CONFIG

ROOT = Path(__file__).resolve().parents[2]
ROWS = 200


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data; nothing is written into the repository."""
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"Tell me about {n}.", "answer": "No.", "user": f"u{n % 50}"} for n in range(ROWS)]
    write_jsonl(tmp_path / "data" / "chats.jsonl", rows)
    splits = {"train": datasets.Dataset.from_list(rows), "val": datasets.Dataset.from_list(rows[:9])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data" / "labelled_chats")
    assert done.returncode == 0, done.stderr
    report = json.loads(Path("outputs/debug/privacy_report.json").read_text())
    spent = Budget("outputs/debug/budget.jsonl").epsilon(5e-7)
    assert report["guarantee"] == "dp"
    assert spent == pytest.approx(report["epsilon"], rel=1e-9)
    assert spent <= 5.94
