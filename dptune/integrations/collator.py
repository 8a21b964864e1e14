"""Rows for private causal language modelling: padded on the right, with one row of position ids per example.

A model that makes its own position ids makes a single row for all examples, [1, T]. Its position embedding would then
have one gradient for all B examples instead of one per example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dptune.losses import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class DataCollatorForPrivateCausalLanguageModeling:
    """[{input_ids, labels?, attention_mask?}] -> input_ids, attention_mask, position_ids and labels, each [B, T].

    A feature without labels gets its input ids as labels. Labels are -100 on padding, including padding that a feature
    already has (attention_mask 0). All other keys of a feature are dropped.

    Args:
        tokenizer: rows are padded with its padding token, or with its end token if it has none.
        pad_to_multiple_of: T is rounded up to a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int = 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [[int(token) for token in feature["input_ids"]] for feature in features]
        masks = [_or_ones(feature, row) for feature, row in zip(features, rows, strict=True)]
        labels = [_labels(*triple) for triple in zip(features, rows, masks, strict=True)]
        width = max(1, *(len(row) for row in rows))
        width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return {
            "input_ids": _filled(rows, width, self._fill),
            "attention_mask": _filled(masks, width, 0),
            "position_ids": torch.arange(width).repeat(len(rows), 1),
            "labels": _filled(labels, width, IGNORE),
        }

    @property
    def _fill(self) -> int:
        tokens = (getattr(self.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        return next((token for token in tokens if token is not None), 0)


def _or_ones(feature: Mapping[str, Any], row: list[int]) -> list[int]:
    mask = feature.get("attention_mask")
    return [1] * len(row) if mask is None else [int(value) for value in mask]


def _labels(feature: Mapping[str, Any], row: list[int], mask: list[int]) -> list[int]:
    own = feature.get("labels")
    labels = row if own is None else [int(label) for label in own]
    return [label if seen else IGNORE for label, seen in zip(labels, mask, strict=True)]


def _filled(rows: list[list[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
