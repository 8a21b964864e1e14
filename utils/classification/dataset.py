"""Labelled texts as token ids in flat arrays, and right-padded batches of them.

Shapes: B examples per batch, T tokens (padded), N examples in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from dptune._validate import Described, refuse, require_count
from utils.classification.labelled_texts import LabelledTexts
from utils.data.special_tokens import UnwrittenToken
from utils.data.text_only import TextOnly
from utils.data.tokenization import IGNORED

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 1000
_DUMMY_TOKENS = 2  # as in `utils.data.tokenization`; no text fits in fewer


@dataclass(frozen=True)
class ClassificationDataset:
    """Token ids of all examples end to end, and the class of each example.

    Attributes:
        ids: token ids, int32.
        token_types: which text of a pair each token belongs to, uint8; None where the tokenizer does not say.
        starts: N + 1 positions, int64; example i is `ids[starts[i]:starts[i + 1]]`, never empty.
        labels: class numbers, int64 [N].
        num_cut: how many examples were longer than the maximum and were cut.
        authors: always None, because the privacy unit is a row.
        num_skipped: how many rows of the source are left out because they are damaged or have no label.
    """

    ids: np.ndarray
    token_types: np.ndarray | None
    starts: np.ndarray
    labels: np.ndarray
    num_cut: int
    authors: None = None
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens per example, int64 [N], at least 1. Made once: every step asks for some of them."""
        return np.diff(self.starts)

    def batch(
        self, indices: Sequence[int] | np.ndarray, pad_token_id: int, width: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The chosen examples, padded on the right to `width` tokens, or else to the longest.

        Args:
            indices: B examples. An empty list gives a dummy batch, for a rank whose share of a draw is empty. It is one
                row whose label is ignored, so its loss and its gradient are exactly zero.
            pad_token_id: fills the right; any id of the vocabulary works.
            width: T; at least the length of every chosen example.

        Returns:
            "input_ids" and "attention_mask" [B, T], "labels" [B], and "token_type_ids" [B, T] where the tokenizer
            gives them; all int64. The mask is 1 on an example's own tokens, 0 on padding.
        """
        rows = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        width = width or max((row.stop - row.start for row in rows), default=_DUMMY_TOKENS)
        shape = (max(len(rows), 1), width)
        ids, mask = np.full(shape, pad_token_id, dtype=np.int64), np.full(shape, int(not rows), dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64)
        for b, row in enumerate(rows):
            size = row.stop - row.start
            ids[b, :size], mask[b, :size] = self.ids[row], 1
            if self.token_types is not None:
                types[b, :size] = self.token_types[row]
        labels = self.labels[np.asarray(indices, dtype=np.int64)] if rows else np.full(1, IGNORED, dtype=np.int64)
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.token_types is not None:
            arrays["token_type_ids"] = types
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def fingerprint(self) -> str:
        """SHA-256 over the examples in order, to check that a resumed run has the data it began with.

        It is not private: anyone who guesses the data can confirm the guess. Keep it in checkpoints, not in reports.
        """
        digest = hashlib.sha256()
        for array in (self.starts, self.labels, self.ids, self.token_types):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | np.ndarray) -> ClassificationDataset:
        """The chosen examples, in the order given; `num_cut` and `num_skipped` stay those of the whole set."""
        indices = np.asarray(indices, dtype=np.int64)
        tokens = np.concatenate(
            [np.empty(0, dtype=np.int64), *(np.arange(self.starts[i], self.starts[i + 1]) for i in indices)]
        )
        return replace(
            self,
            ids=self.ids[tokens],
            token_types=None if self.token_types is None else self.token_types[tokens],
            starts=np.concatenate([[0], np.cumsum(self.lengths[indices])]).astype(np.int64),
            labels=self.labels[indices],
        )


def tokenize_texts(
    rows: LabelledTexts, tokenizer: PreTrainedTokenizerBase, max_length: int, suffix: Sequence[int] = ()
) -> ClassificationDataset:
    """Tokenise every text or pair with the tokenizer's special tokens around it. N rows stay N, whatever they hold.

    The tokenizer cuts what is too long and keeps its special tokens; it shortens the longer text of a pair first.
    A row without any token (an empty text, where no special tokens are added) becomes one end token, or another
    special token if there is no end token. The suffix comes last and is never cut.

    Args:
        rows: N texts or pairs.
        tokenizer: the model's.
        max_length: maximum number of tokens per example, counting special tokens and the suffix.
        suffix: tokens behind every text; see `utils.classification.label_words.suffix_tokens`.

    Raises:
        InvalidArgument: `max_length` is below 2 or leaves no room between the special tokens, or a text is empty and
            the tokenizer has no special token at all, or the tokenizer makes a special token of a text.
    """
    _require_room(tokenizer, max_length, len(rows.texts), len(suffix))
    ids: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    types: list[np.ndarray] = []
    num_cut, encode = 0, TextOnly(tokenizer)
    for first in range(0, len(rows), _TEXTS_AT_ONCE):
        chunk = [column[first : first + _TEXTS_AT_ONCE] for column in rows.texts]
        try:
            encoded, num_cut_here = _encode(chunk, encode, max_length - len(suffix))
        except UnwrittenToken as error:
            remedy = f"makes a special token of the text of row {first + error.number}; change the row or the model"
            refuse("--model_name_or_path", Described(f"the tokenizer {type(tokenizer).__name__}"), remedy)
        num_cut += num_cut_here
        ids += [np.array([*(row or [_filler(tokenizer)]), *suffix], dtype=np.int32) for row in encoded["input_ids"]]
        types += [
            np.array([*(row or [0]), *[0] * len(suffix)], dtype=np.uint8) for row in encoded.get("token_type_ids", [])
        ]
    return ClassificationDataset(
        ids=np.concatenate(ids),
        token_types=np.concatenate(types) if types else None,
        starts=np.cumsum([len(row) for row in ids], dtype=np.int64),
        labels=rows.labels,
        num_cut=num_cut,
        num_skipped=rows.num_skipped,
    )


def _require_room(tokenizer: PreTrainedTokenizerBase, max_length: int, num_texts: int, num_last: int) -> None:
    """Refuse a `max_length` in which one token per text does not fit between the special tokens and the suffix."""
    require_count("--block_size", max_length, minimum=_DUMMY_TOKENS)
    needed = tokenizer.num_special_tokens_to_add(pair=num_texts == 2) + num_texts + num_last
    if max_length < needed:
        told = "special tokens, the suffix" if num_last else "special tokens"
        refuse("--block_size", max_length, f"{told} and one token per text need {needed}; give at least that")


def _encode(texts: Sequence[list[str]], encode: TextOnly, max_length: int) -> tuple[BatchEncoding, int]:
    """(the rows' tokens, how many rows were cut). Only rows that are too long are tokenised twice."""
    encoded = encode(*texts, truncation=False)
    long = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
    if long:
        chosen = [[column[row] for row in long] for column in texts]
        cut = encode(*chosen, truncation="longest_first", max_length=max_length)
        for key, values in cut.items():
            for row, value in zip(long, values, strict=True):
                encoded[key][row] = value
    return encoded, len(long)


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that represents an empty text."""
    tokens = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    found = next((token for token in tokens if token is not None), None)
    if found is None:
        name = type(tokenizer).__name__
        refuse("--model_name_or_path", name, "has no token for an empty text; set eos_token in tokenizer_config.json")
    return int(found)
