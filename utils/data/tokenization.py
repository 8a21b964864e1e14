"""Tokenised examples as flat arrays, in memory or mapped from files, and batches of them.

Shapes: B examples per batch, T tokens (padded), N examples in total.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from dptune.sampling import Parts
from dptune.units.unit import Authors
from utils.data.encoding import SHORTEST, Encoder
from utils.data.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_DIAL = -1  # of a row that turns none
IGNORED = -100  # the label that the losses of torch and transformers ignore
_TEXTS_AT_ONCE = 1000
_BLOCK = 1 << 22  # elements of an array that are read at a time
_BLOCK_ROWS = 1 << 11  # numpy makes whole numbers of all their tokens


@dataclass(frozen=True)
class TokenizedDataset:
    """Token ids of all examples, concatenated, and which of them are learned.

    Arrays may be mapped from files. Then only the pages that are being read take memory.

    Attributes:
        ids: token ids, int32.
        is_answer: for each token, whether its loss counts, bool. False for an example's first token, which nothing
            predicts.
        starts: N + 1 positions, int64; example i is `ids[starts[i]:starts[i + 1]]`, never empty.
        num_cut: number of examples that were cut to the block size.
        authors: the authors of the examples, if they are the privacy unit.
        prompt_style: the style that sampling must use, if it is known.
        parts: the parts whose examples are drawn more or less often; None if all are drawn alike.
        dials: for an audit, the dial that each example turns, int64 [N], or NO_DIAL; None without an audit.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    starts: np.ndarray
    num_cut: int
    authors: Authors | None = None
    prompt_style: str | None = None
    parts: Parts | None = None
    dials: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens per example, int64 [N], at least 1. Made once: every step asks for some of them."""
        lengths = np.empty(len(self), dtype=np.int64)
        for first in range(0, len(self), _BLOCK):
            edges = self.starts[first : first + _BLOCK + 1]
            lengths[first : first + len(edges) - 1] = np.diff(edges)
            _forget(self.starts)
        return lengths

    @cached_property
    def num_answer_tokens(self) -> np.ndarray:
        """Number of tokens per example whose loss counts, int64 [N]; 0 for an example with a zero gradient."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self._answer_tokens()])

    @cached_property
    def num_without_answer(self) -> int:
        """Number of examples with a zero gradient. They stay, since dropping them would change the sampling."""
        return sum(int((counts == 0).sum()) for counts in self._answer_tokens())

    def ids_until(self, vocabulary: int) -> np.ndarray:
        """The token ids up to the first that is not below `vocabulary`; none if all are. Takes the memory of a block
        where all are."""
        done = 0
        for block in _blocks(self.ids):
            beyond = np.flatnonzero((block >= vocabulary) | (block < 0))
            if len(beyond):
                return self.ids[: done + int(beyond[0]) + 1]
            done += len(block)
        return self.ids[:0]

    def batch(
        self, indices: Sequence[int] | np.ndarray, pad_token_id: int, width: int | None = None
    ) -> dict[str, torch.Tensor]:
        """A batch of examples, padded on the right to `width` tokens, or else to the longest.

        There is no attention mask: under causal attention a token sees only tokens to its left, never right padding,
        and padded positions have no loss. (A model without causal attention needs a mask.)

        Args:
            indices: B examples. If empty, the batch is a dummy: one row without a token to learn, whose gradient is
                exactly zero.
            pad_token_id: the padding; any id of the vocabulary works.
            width: T; at least the length of every chosen example.

        Returns:
            "input_ids" [B, T] and "labels" [B, T], int64. labels[b, t] is input_ids[b, t] where the token's loss counts
            and -100 elsewhere. Labels are not shifted; the loss shifts them. With an audit's dials also "dials" [B, 1].
        """
        rows = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        width = width or max((row.stop - row.start for row in rows), default=SHORTEST)
        input_ids = np.full((max(len(rows), 1), width), pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        for b, row in enumerate(rows):
            size = row.stop - row.start
            input_ids[b, :size] = self.ids[row]
            labels[b, :size] = np.where(self.is_answer[row], self.ids[row], IGNORED)
        for array in (self.starts, self.ids, self.is_answer):
            _forget(array)  # a page holds many rows: all pages would soon be in memory
        inputs = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if self.dials is not None:
            turned = self.dials[np.asarray(indices, dtype=np.int64)] if len(indices) else np.array([NO_DIAL])
            inputs["dials"] = torch.from_numpy(turned)[:, None]
        return inputs

    def fingerprint(self) -> str:
        """SHA-256 over the examples in order, to check that a resumed run has the same data.

        It is not private, since anyone who guesses the data can confirm the guess. Keep it in a checkpoint, not in a
        report.
        """
        digest = hashlib.sha256()
        authors = () if self.authors is None else (self.authors.of_row,)
        dials = () if self.dials is None else (self.dials,)
        for array in (self.starts, self.ids, self.is_answer, *authors, *dials):
            for block in _blocks(array):
                digest.update(np.ascontiguousarray(block).tobytes())
        return digest.hexdigest()

    def _answer_tokens(self) -> Iterator[np.ndarray]:
        """Parts of `num_answer_tokens`, in order."""
        for first in range(0, len(self), _BLOCK_ROWS):
            edges = self.starts[first : first + _BLOCK_ROWS + 1]
            mask = self.is_answer[edges[0] : edges[-1]]
            yield np.add.reduceat(mask, edges[:-1] - edges[0], dtype=np.int64)
            _forget(self.is_answer)
            _forget(self.starts)


def tokenize(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, block_size: int) -> TokenizedDataset:
    """Records in memory as a data set in memory, in order. Files of rows go through `utils.data.load`.

    Args:
        records: N records; every one becomes an example.
        tokenizer, block_size: see `Encoder`.

    Raises:
        InvalidArgument: see `Encoder`.
    """
    encoder = Encoder(tokenizer, block_size)
    chunks = range(0, max(len(records), 1), _TEXTS_AT_ONCE)
    parts = [encoder.encoded(records[first : first + _TEXTS_AT_ONCE], first) for first in chunks]
    ids, is_answer, sizes = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[:3])
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return TokenizedDataset(ids, is_answer, starts, sum(part.num_cut for part in parts))


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The parts of an array in order, of which a mapped one keeps only the last in memory."""
    for start in range(0, len(array), _BLOCK):
        yield array[start : start + _BLOCK]
        _forget(array)


def _forget(array: np.ndarray) -> None:
    """Give the pages of a mapped array back to the system; they are read again when they are needed."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)
