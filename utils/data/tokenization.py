"""Records -> token ids and the tokens whose loss counts, in flat arrays, and right-padded batches of them.

The whole text is tokenised at once and answer tokens are found by their character offsets. Tokenising the prompt apart
would give other tokens wherever one spans the border: in "Abstract: We" the model meets " We", not " " and "We".

Shapes: B examples of a batch, T tokens (padded), N examples in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dptune._validate import refuse, require_count
from dptune.units.unit import Authors
from utils.data.records import Record, end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's and transformers' losses leave out
_TEXTS_AT_ONCE = 1000
_DUMMY_TOKENS = 2  # the shortest row with a next token to predict


@dataclass(frozen=True)
class TokenizedDataset:
    """Token ids of all examples end to end, and which of them are learned.

    Attributes:
        ids: token ids, int32.
        is_answer: for each token, whether its loss counts, bool. Never an example's first token: nothing precedes it,
            so no prediction of it exists.
        starts: N + 1 positions, int64; example i is `ids[starts[i]:starts[i + 1]]`, never empty.
        num_cut: how many examples were longer than the block size and lost their end.
        authors: who wrote them, where that is the privacy unit.
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
        """Tokens of each example, int64 [N], at least 1."""
        return np.diff(self.starts)

    @property
    def num_answer_tokens(self) -> np.ndarray:
        """Tokens of each example whose loss counts, int64 [N]; 0 for an example that contributes a zero gradient."""
        return np.diff(np.concatenate([[0], np.cumsum(self.is_answer, dtype=np.int64)])[self.starts])

    @property
    def num_without_answer(self) -> int:
        """How many examples contribute a zero gradient. They stay: dropping them would change the sampling."""
        return int((self.num_answer_tokens == 0).sum())

    def batch(self, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
        """Some examples, padded on the right to the longest.

        There is no attention mask: under causal attention a real token sees only what is left of it, so right padding
        never reaches one, and padded positions have no loss. (A model without causal attention needs a mask.)

        Args:
            indices: B examples. None at all gives the dummy of an empty share of a draw: one row, nothing to learn, so
                its gradient is exactly zero.
            pad_token_id: fills the right; any id of the vocabulary does.

        Returns:
            "input_ids" [B, T] and "labels" [B, T], int64. labels[b, t] is input_ids[b, t] where the token's loss counts
            and -100 elsewhere: not shifted, the loss does that.
        """
        rows = [slice(self.starts[i], self.starts[i + 1]) for i in indices]
        width = max((row.stop - row.start for row in rows), default=_DUMMY_TOKENS)
        input_ids = np.full((max(len(rows), 1), width), pad_token_id, dtype=np.int64)
        labels = np.full_like(input_ids, IGNORED)
        for b, row in enumerate(rows):
            size = row.stop - row.start
            input_ids[b, :size] = self.ids[row]
            labels[b, :size] = np.where(self.is_answer[row], self.ids[row], IGNORED)
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def fingerprint(self) -> str:
        """SHA-256 over the examples in order: whether a resumed run has the data it began with.

        It is not private (who guesses the data can confirm the guess): it belongs in a checkpoint, not in a report.
        """
        digest = hashlib.sha256()
        for array in (self.starts, self.ids, self.is_answer):
            digest.update(np.ascontiguousarray(array).tobytes())
        if self.authors is not None:
            digest.update(self.authors.of_row.tobytes())
        return digest.hexdigest()


def tokenize(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, block_size: int) -> TokenizedDataset:
    """Every record as tokens, in order, with the tokenizer's ordinary special tokens and an end token.

    An answer that begins the text gets the start token before it (the end token, where the tokenizer has no other), for
    that is what sampling without a prompt begins with, and without it nothing would predict the first word.

    The end token is learned with the answer, so that the model stops by itself. A text that ends in it already (chat
    templates often write it) gets no second one, and loses white space after it.

    Args:
        records: N records; N stays N, whatever they hold.
        tokenizer: a fast one (it tells offsets) with an end token.
        block_size: longer examples are cut to this many tokens, on the right. One whose answer is lost entirely stays,
            with nothing to learn.

    Raises:
        InvalidArgument: the tokenizer has no offsets or no end token, or block_size is below 2.
    """
    require_count("--block_size", block_size, minimum=_DUMMY_TOKENS)
    _require_tokenizer(tokenizer)
    ids: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    masks: list[np.ndarray] = [np.empty(0, dtype=bool)]
    sizes: list[int] = [0]
    num_cut = 0
    for tokens, mask in _tokenized(records, tokenizer):
        num_cut += len(tokens) > block_size
        # Copied, for a slice would keep the whole of a long text alive.
        ids.append(tokens[:block_size].copy())
        masks.append(mask[:block_size].copy())
        sizes.append(len(ids[-1]))
    return TokenizedDataset(np.concatenate(ids), np.concatenate(masks), np.cumsum(sizes, dtype=np.int64), num_cut)


def _require_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """What masking by offsets needs."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        refuse("--model_name_or_path", name, "its tokenizer tells no offsets; take a model with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        refuse("--model_name_or_path", name, "its tokenizer has no end token; set eos_token in tokenizer_config.json")


def _tokenized(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [T], is_answer bool [T]) of each record, uncut. In chunks: offsets of a whole corpus are large."""
    for first in range(0, len(records), _TEXTS_AT_ONCE):
        chunk = records[first : first + _TEXTS_AT_ONCE]
        encoded = tokenizer(
            [record.text[: end_of_turn(record.text, tokenizer.eos_token)] for record in chunk],
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            verbose=False,  # no warning that a text is longer than the model's context: it is cut to block_size
        )
        for record, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            mask = answer_mask(np.array(offsets, dtype=np.int64).reshape(-1, 2), record.answers)
            tokens, mask = _with_start(np.array(ids, dtype=np.int32), mask, start_token(tokenizer))
            yield _with_end(tokens, mask, tokenizer.eos_token_id, learn_end=bool(record.answers))


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text without a prompt begins with."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def answer_mask(offsets: np.ndarray, answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens hold a character of an answer.

    A token across the border (the prompt's last space with the answer's first word) counts: the model has to write it.
    Byte-level tokenizers that trim offsets (GPT-2, Llama 3) give a run of spaces no width, at its end: such a token
    counts by that position, or indentation would never be learned. Special tokens that the tokenizer added stand at 0
    without width, and never count.

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
    """Something before the first token, if that is to be learned."""
    if not (len(mask) and mask[0]):
        return ids, mask
    return np.insert(ids, 0, np.int32(start)), np.insert(mask, 0, False)


def _with_end(ids: np.ndarray, mask: np.ndarray, eos: int, *, learn_end: bool) -> tuple[np.ndarray, np.ndarray]:
    """One end token at the end, learned if there is an answer for it to end; the first token is never learned."""
    while len(ids) and ids[-1] == eos:  # written by the template, the answer or the tokenizer, or by two of them
        ids, mask = ids[:-1], mask[:-1]
    ids, mask = np.append(ids, np.int32(eos)), np.append(mask, learn_end)
    mask[0] = False
    return ids, mask
