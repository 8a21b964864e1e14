"""Small classification files: in GLUE's format (same columns and order, tab-separated, no quoting) and a user's."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

HEADERS = {
    "sst2": "sentence label",
    "qnli": "index question sentence label",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label",
    "mnli_dev": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1 label2 label3 label4 label5 gold_label",
}
TEXTS = {"sst2": (0,), "qnli": (1, 2), "qqp": (3, 4), "mnli": (8, 9), "mnli_dev": (8, 9)}
LABELS = {
    "sst2": ("0", "1"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("0", "1"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mnli_dev": ("entailment", "neutral", "contradiction"),
}
FILES = {
    "sst2": ("train.tsv", "dev.tsv"),
    "qnli": ("train.tsv", "dev.tsv"),
    "qqp": ("train.tsv", "dev.tsv"),
    "mnli": ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"),
}


def fields_of(kind: str, texts: Sequence[str], label: str) -> list[str]:
    """The fields of a row. Fields that are neither text nor label hold values that must not be mistaken for them."""
    fields = [f"filling {at}" for at in range(len(HEADERS[kind].split()))]
    for at, text in zip(TEXTS[kind], texts, strict=True):
        fields[at] = text
    return [*fields[:-1], label]


def write_tsv(path: Path, kind: str, rows: Sequence[Sequence[str]], end: str = "\n") -> Path:
    """A file with the header of `kind` and these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [HEADERS[kind].split(), *rows]
    path.write_bytes("".join("\t".join(line) + end for line in lines).encode())
    return path


def write_task(folder: Path, task: str, count: int = 6) -> Path:
    """All files of a task, `count` rows in training and 2 fewer in each other split, labels in turn."""
    for file in FILES[task]:
        kind = "mnli_dev" if file.startswith("dev_") else task
        num_texts, labels = len(TEXTS[kind]), LABELS[kind]
        rows = [
            fields_of(kind, [f"{file} {i} text {part}" for part in range(num_texts)], labels[i % len(labels)])
            for i in range(count if file == "train.tsv" else count - 2)
        ]
        write_tsv(folder / file, kind, rows)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the suffix; no suffix means a saved DatasetDict."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps({name: [row[name] for row in rows] for name in rows[0]}))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return path
