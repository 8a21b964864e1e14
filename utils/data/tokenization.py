"""Turns records into token ids and a mask of the tokens whose loss counts, as flat arrays, and makes batches of them.

The whole text is tokenised at once, and answer tokens are found by their character offsets. Tokenising the prompt alone
would give other tokens at the border: in "Abstract: We" the model sees " We", not " " and "We".

Shapes: B examples per batch, T tokens (padded), N examples in total.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dptune._validate import Described, refuse, require_count
from dptune.units.unit import Authors
from utils.data.answers import end_of_turn
from utils.data.records import Record
from utils.data.special_tokens import MarkedText, SpecialTokens, Tokens, UnwrittenToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the losses of torch and transformers ignore
_TEXTS_AT_ONCE = 1000
_DUMMY_TOKENS = 2  # the shortest row that has a token to predict


@dataclass(frozen=True)
class TokenizedDataset:
    """Token ids of all examples, concatenated, and which of them are learned.

    Attributes:
        ids: token ids, int32.
        is_answer: for each token, whether its loss counts, bool. False for an example's first token, which nothing
            predicts.
        starts: N + 1 positions, int64; example i is `ids[starts[i]:starts[i + 1]]`, never empty.
        num_cut: number of examples that were cut to the block size.
        authors: the authors of the examples, if they are the privacy unit.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    starts: np.ndarray
    num_cut: int
    authors: Authors | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens per example, int64 [N], at least 1."""
        return np.diff(self.starts)

    @property
    def num_answer_tokens(self) -> np.ndarray:
        """Number of tokens per example whose loss counts, int64 [N]; 0 for an example with a zero gradient."""
        return np.diff(np.concatenate([[0], np.cumsum(self.is_answer, dtype=np.int64)])[self.starts])

    @property
    def num_without_answer(self) -> int:
        """Number of examples with a zero gradient. They stay, since dropping them would change the sampling."""
        return int((self.num_answer_tokens == 0).sum())

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
            and -100 elsewhere. Labels are not shifted; the loss shifts them.
        """
        rows = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        width = width or max((row.stop - row.start for row in rows), default=_DUMMY_TOKENS)
        input_ids = np.full((max(len(rows), 1), width), pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        for b, row in enumerate(rows):
            size = row.stop - row.start
            input_ids[b, :size] = self.ids[row]
            labels[b, :size] = np.where(self.is_answer[row], self.ids[row], IGNORED)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def fingerprint(self) -> str:
        """SHA-256 over the examples in order, to check that a resumed run has the same data.

        It is not private, since anyone who guesses the data can confirm the guess. Keep it in a checkpoint, not in a
        report.
        """
        digest = hashlib.sha256()
        for array in (self.starts, self.ids, self.is_answer):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.authors is not None:
            digest.update(self.authors.of_row.tobytes())
        return digest.hexdigest()


def tokenize(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, block_size: int) -> TokenizedDataset:
    """Every record as tokens, in order, with the tokenizer's ordinary special tokens and an end token.

    If the answer begins the text, the start token (or the end token, if there is no start token) comes before it.
    Sampling without a prompt begins the same way, and otherwise nothing would predict the first word.

    The end token is learned with the answer, so that the model learns to stop. A text that already ends with it, as
    from many chat templates, gets no second one, and white space after it is removed.

    Args:
        records: N records; every one becomes an example.
        tokenizer: a fast tokenizer (which gives offsets) with an end token.
        block_size: maximum tokens per example; longer examples are cut at the end. An example that loses its whole
            answer stays, with nothing to learn.

    Raises:
        InvalidArgument: the tokenizer has no offsets or no end token, block_size is below 2, or the tokenizer makes a
            special token of a text that has none.
    """
    require_count("--block_size", block_size, minimum=_DUMMY_TOKENS)
    _require_tokenizer(tokenizer)
    ids: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    masks: list[np.ndarray] = [np.empty(0, dtype=bool)]
    sizes: list[int] = [0]
    num_cut = 0
    for tokens, mask in _tokenized(records, tokenizer):
        num_cut += len(tokens) > block_size
        # Copied, since a slice would keep the whole text in memory.
        ids.append(tokens[:block_size].copy())
        masks.append(mask[:block_size].copy())
        sizes.append(len(ids[-1]))
    return TokenizedDataset(np.concatenate(ids), np.concatenate(masks), np.cumsum(sizes, dtype=np.int64), num_cut)


def _require_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without offsets or without an end token."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        refuse("--model_name_or_path", name, "its tokenizer gives no offsets; use a model with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        refuse("--model_name_or_path", name, "its tokenizer has no end token; set eos_token in tokenizer_config.json")


def _tokenized(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [T], is_answer bool [T]) of each record, uncut. Works in chunks, as offsets need much memory."""
    special = SpecialTokens(tokenizer)
    for first in range(0, len(records), _TEXTS_AT_ONCE):
        chunk = records[first : first + _TEXTS_AT_ONCE]
        texts = [MarkedText(one.text[: end_of_turn(one.text, tokenizer.eos_token)], one.typed) for one in chunk]
        for record, (ids, offsets) in zip(chunk, _encoded(texts, special, tokenizer, first), strict=True):
            mask = answer_mask(np.array(offsets, dtype=np.int64).reshape(-1, 2), record.answers)
            tokens, mask = _with_start(np.array(ids, dtype=np.int32), mask, start_token(tokenizer))
            yield _with_end(tokens, mask, tokenizer.eos_token_id, learn_end=bool(record.answers))


def _encoded(
    texts: Sequence[MarkedText], special: SpecialTokens, tokenizer: PreTrainedTokenizerBase, first: int
) -> Iterator[Tokens]:
    """The tokens of the texts of a chunk that begins at example `first`, counted from 0."""
    try:
        yield from special.encoded(texts)
    except UnwrittenToken as error:
        remedy = f"makes a special token of the text of example {first + error.number}; change the row or the model"
        refuse("--model_name_or_path", Described(f"the tokenizer {type(tokenizer).__name__}"), remedy)


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first token of a text without a prompt."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def answer_mask(offsets: np.ndarray, answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens hold a character of an answer.

    A token across the border (the prompt's last space with the answer's first word) counts: the model has to write it.
    Byte-level tokenizers that trim offsets (GPT-2, Llama 3) give a run of spaces zero width, at its end. Such a token
    counts by that position, so that indentation is learned. Special tokens that the tokenizer added have zero width at
    position 0, and never count.

    Args:
        offsets: (start, end) of each token in characters, int64 [T, 2].
        answers: (start, end) of each answer.

    Returns:
        bool [T].

    >>> answer_mask(np.array([[0, 0], [0, 4], [4, 8]]), [(5, 8)]).tolist()
    [False, False, True]
    """
    start, end = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=bool)
    for first, last in answers:
        wide = (end > start) & (start < last)
        spaces = (end == start) & (end <= last)
        mask |= (end > first) & (wide | spaces)
    return mask


def _with_start(ids: np.ndarray, mask: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Add the start token if the first token is to be learned."""
    if not (len(mask) and mask[0]):
        return ids, mask
    return np.insert(ids, 0, np.int32(start)), np.insert(mask, 0, False)


def _with_end(ids: np.ndarray, mask: np.ndarray, eos: int, *, learn_end: bool) -> tuple[np.ndarray, np.ndarray]:
    """End the text with exactly one end token, learned if `learn_end`. The first token is never learned."""
    while len(ids) and ids[-1] == eos:  # from the template, the answer or the tokenizer, or several
        ids, mask = ids[:-1], mask[:-1]
    ids, mask = np.append(ids, np.int32(eos)), np.append(mask, learn_end)
    mask[0] = False
    return ids, mask
