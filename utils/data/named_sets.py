"""Names and folders of the data sets for `--dataset_name`. Apart from their readers, so that flags parse quickly."""

from __future__ import annotations

from pathlib import Path

DATASET_NAMES = ("pubmed_generation",)
DATA_DIR = Path(__file__).resolve().parents[2] / "data"
FIRST_DAY, LAST_DAY = "2023-08-01", "2023-08-07"  # default range of abstracts
