"""The data sets that `--dataset_name` knows, and where they lie: apart from their readers, so that flags are quick."""

from __future__ import annotations

from pathlib import Path

DATASET_NAMES = ("pubmed_generation",)
DATA_DIR = Path(__file__).resolve().parents[2] / "data"
FIRST_DAY, LAST_DAY = "2023-08-01", "2023-08-07"  # of the abstracts, unless the flags say otherwise
