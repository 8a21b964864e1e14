"""Authors as items of a Trainer's data set: an item is the list of rows chosen for one author.

The collator adds rows without a label, so that all authors of a micro-batch have the same number of rows. It weights
the rows so that an author's losses add up to their mean.

Shapes: U items, k rows per item in a micro-batch, T tokens (padded).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dptune.integrations.collator import DataCollatorForPrivateCausalLanguageModeling
from dptune.integrations.losses import DefaultLosses
from dptune.integrations.peft import TransformersModel
from dptune.losses import IGNORE
from dptune.units.batches import choose_rows, row_weights
from dptune.units.unit import Authors

Feature = dict[str, list[int]]
_WEIGHTS = "weights"


class AuthorItems(Dataset[list[Feature]]):
    """Up to k rows of each author, chosen uniformly and anew each time the author is read.

    The choice uses the operating system's randomness (even with a test seed), so every worker of a loader chooses
    independently.

    Args:
        rows: the rows of all authors.
        authors: who wrote which row.
        most: k, the maximum number of rows per author.
    """

    def __init__(self, rows: Sequence[Feature], authors: Authors, most: int) -> None:
        self._rows, self._of_author, self._most = rows, authors.rows(), most

    @property
    def all_rows(self) -> Sequence[Feature]:
        """The rows of all authors; an item holds a choice of them."""
        return self._rows

    @property
    def counts(self) -> np.ndarray:
        """Number of rows of each item, int64 [authors]."""
        return np.array([min(len(rows), self._most) for rows in self._of_author], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._of_author)

    def __getitem__(self, author: int) -> list[Feature]:
        return [self._rows[int(row)] for row in choose_rows(self._of_author[author], self._most, _secret_numbers)]


def _secret_numbers(count: int) -> np.ndarray:
    return np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)


class AuthorCollator(DataCollatorForPrivateCausalLanguageModeling):
    """[rows of an author] -> input_ids, attention_mask, position_ids and labels, each [U * k, T], and weights [U * k].

    Plain rows, as in evaluation, are collated without weights.
    """

    def __call__(self, features: Sequence[Any]) -> dict[str, Tensor]:
        if isinstance(features[0], Mapping):
            return super().__call__(features)
        most = max(len(rows) for rows in features)
        empty = {"input_ids": [self._fill], "labels": [IGNORE]}
        filled = [row for rows in features for row in [*rows, *[empty] * (most - len(rows))]]
        counts = np.array([len(rows) for rows in features])
        return super().__call__(filled) | {_WEIGHTS: row_weights(counts, most, mean=True)}


class AuthorLosses:
    """(model, inputs) -> losses [U * k]. The losses of an author add up to the mean over their rows."""

    of_default_labels = True  # labels mean what they do to `DefaultLosses`

    def __init__(self) -> None:
        self._losses = DefaultLosses()

    def __call__(self, model: TransformersModel, inputs: Mapping[str, Tensor]) -> Tensor:
        rows = {name: values for name, values in inputs.items() if name != _WEIGHTS}
        return self._losses(model, rows) * inputs[_WEIGHTS]
