"""Tokenised rows as features for transformers' collators and Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from dptune.integrations.authors import Feature
from dptune.losses import IGNORE
from utils.data.tokenization import TokenizedDataset


class RowFeatures(Sequence[Feature]):
    """{"input_ids", "labels"} of each row."""

    def __init__(self, tokens: TokenizedDataset) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, row: int) -> Feature: ...
    @overload
    def __getitem__(self, row: slice) -> list[Feature]: ...
    def __getitem__(self, row: int | slice) -> Feature | list[Feature]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        tokens = slice(self._tokens.starts[row], self._tokens.starts[row + 1])
        ids = self._tokens.ids[tokens]
        labels = np.where(self._tokens.is_answer[tokens], ids, IGNORE)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def __iter__(self) -> Iterator[Feature]:
        return (self[row] for row in range(len(self)))
