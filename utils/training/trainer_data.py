"""Tokenised rows as a Trainer reads them: one row an item, or one author an item.

An author's item is the list of the rows chosen of theirs. The collator fills authors up to the one with the most in a
micro-batch, by rows without a label, and weighs each row so that an author's losses add up to their mean.

Shapes: U items, k rows for each of them in a micro-batch, T tokens (padded).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dptune.integrations.losses import DefaultLosses
from dptune.integrations.transformers import DataCollatorForPrivateCausalLanguageModeling
from utils.data.tokenization import IGNORED, TokenizedDataset

Feature = dict[str, list[int]]
_WEIGHTS = "weights"


class Rows(Dataset[Feature]):
    """{"input_ids", "labels"} of each row."""

    def __init__(self, tokens: TokenizedDataset) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, row: int) -> Feature:
        tokens = slice(self._tokens.starts[row], self._tokens.starts[row + 1])
        ids = self._tokens.ids[tokens]
        labels = np.where(self._tokens.is_answer[tokens], ids, IGNORED)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}


class AuthorRows(Dataset[list[Feature]]):
    """Up to k rows of each author, chosen uniformly and afresh whenever an author is asked for.

    Chosen from the operating system's randomness, also under a test's seed. What is chosen depends on nobody else, so
    the bound, which is on whatever an author's rows add up to, needs no more.

    Args:
        tokens: rows with their authors.
        most: k.
    """

    def __init__(self, tokens: TokenizedDataset, most: int) -> None:
        assert tokens.authors is not None, "the data were loaded without the authors' column"
        self._rows, self._of_author, self._most = Rows(tokens), tokens.authors.rows(), most

    @property
    def counts(self) -> np.ndarray:
        """Rows of each item, int64 [authors]."""
        return np.array([min(len(rows), self._most) for rows in self._of_author], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._of_author)

    def __getitem__(self, author: int) -> list[Feature]:
        rows = self._of_author[author].tolist()
        if len(rows) > self._most:
            rows = secrets.SystemRandom().sample(rows, self._most)
        return [self._rows[row] for row in rows]


class AuthorCollator(DataCollatorForPrivateCausalLanguageModeling):
    """[rows of an author] -> input_ids, attention_mask, position_ids and labels, each [U * k, T], and weights [U * k].

    Rows that are no author's, as in evaluation, are collated as they are.
    """

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        if isinstance(features[0], Mapping):
            return super().__call__(features)
        most = max(len(rows) for rows in features)
        empty = {"input_ids": [self._fill], "labels": [IGNORED]}
        filled = [row for rows in features for row in [*rows, *[empty] * (most - len(rows))]]
        weights = [1 / len(rows) for rows in features for _ in range(most)]
        return super().__call__(filled) | {_WEIGHTS: torch.tensor(weights)}


class AuthorLosses:
    """(model, inputs) -> losses [U * k], of which an author's add up to the mean over their rows."""

    def __init__(self) -> None:
        self._losses = DefaultLosses()

    def __call__(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        rows = {name: values for name, values in inputs.items() if name != _WEIGHTS}
        return self._losses(model, rows) * inputs[_WEIGHTS]
