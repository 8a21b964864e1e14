"""Rows as features are the tokenised examples."""

from __future__ import annotations

import numpy as np

from dptune.losses import IGNORE
from tests.examples import random_examples
from utils.data.features import RowFeatures
from utils.data.tokenization import TokenizedDataset


def test_rows_are_the_examples() -> None:
    examples = random_examples(7, seed=3)
    ids = [np.array(row, dtype=np.int32) for row, _ in examples]
    is_answer = [np.array(labels) != IGNORE for _, labels in examples]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    rows = RowFeatures(TokenizedDataset(np.concatenate(ids), np.concatenate(is_answer), starts, 0, None))
    assert [(row["input_ids"], row["labels"]) for row in rows] == examples
    assert rows[2:4] == [rows[2], rows[3]]
