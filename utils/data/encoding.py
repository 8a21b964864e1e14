"""Turns records into token ids and a mask of the tokens whose loss counts. No torch here: worker processes import it.

The whole text is tokenised at once, and answer tokens are found by their character offsets. Tokenising the prompt alone
would give other tokens at the border: in "Abstract: We" the model sees " We", not " " and "We".

Shapes: N examples, T tokens of one example.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dptune._validate import Described, refuse, require_count
from utils.data.answers import end_of_turn
from utils.data.record import Record
from utils.data.special_tokens import MarkedText, SpecialTokens, Tokens, UnwrittenToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 2  # tokens: the shortest row that has a token to predict


class Encoded(NamedTuple):
    """The tokens of N examples, one after another.

    Attributes:
        ids: token ids, int32.
        is_answer: for each token, whether its loss counts, bool.
        sizes: tokens of each example, int32 [N], at least 1.
        num_cut: number of examples that were cut to the block size.
    """

    ids: np.ndarray
    is_answer: np.ndarray
    sizes: np.ndarray
    num_cut: int


class Encoder:
    """Tokenises records, with the tokenizer's ordinary special tokens and an end token.

    If the answer begins the text, the start token (or the end token, if there is no start token) comes before it.
    Sampling without a prompt begins the same way, and otherwise nothing would predict the first word.

    The end token is learned with the answer, so that the model learns to stop. A text that already ends with it, as
    from many chat templates, gets no second one, and white space after it is removed.

    Args:
        tokenizer: a fast tokenizer (which gives offsets) with an end token.
        block_size: maximum tokens per example; longer examples are cut at the end. An example that loses its whole
            answer stays, with nothing to learn.

    Raises:
        InvalidArgument: the tokenizer has no offsets or no end token, or block_size is below 2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        require_count("--block_size", block_size, minimum=SHORTEST)
        _require_tokenizer(tokenizer)
        self._tokenizer, self._block_size, self._special = tokenizer, block_size, SpecialTokens(tokenizer)

    def encoded(self, records: Sequence[Record], first: int = 0) -> Encoded:
        """Every record as tokens, in order.

        Args:
            records: N records; every one becomes an example. All are in memory at once, with offsets that need much.
            first: the number of the first example, from 0, for errors.

        Raises:
            InvalidArgument: the tokenizer makes a special token of a text that has none.
        """
        ids, is_answer, sizes, num_cut, most = array("i"), bytearray(), [], 0, self._block_size
        for tokens, mask in self._tokenized(records, first):
            num_cut += len(tokens) > most
            ids.extend(tokens[:most])
            is_answer.extend(mask[:most])
            sizes.append(min(len(tokens), most))
        return Encoded(
            np.frombuffer(ids, dtype=np.int32),
            np.frombuffer(is_answer, dtype=np.bool_),
            np.array(sizes, dtype=np.int32),
            num_cut,
        )

    def _tokenized(self, records: Sequence[Record], first: int) -> Iterator[tuple[list[int], list[bool]]]:
        """(ids, whether each is learned) of each record, uncut. Lists, which are faster than small arrays."""
        eos, start = self._tokenizer.eos_token, start_token(self._tokenizer)
        texts = [MarkedText(one.text[: end_of_turn(one.text, eos)], one.typed) for one in records]
        for record, (ids, offsets) in zip(records, self._tokens(texts, first), strict=True):
            mask = answer_mask(np.array(offsets, dtype=np.int64).reshape(-1, 2), record.answers).tolist()
            if mask and mask[0]:  # nothing predicts the first token
                ids, mask = [start, *ids], [False, *mask]
            yield _with_end(ids, mask, self._tokenizer.eos_token_id, learn_end=bool(record.answers))

    def _tokens(self, texts: Sequence[MarkedText], first: int) -> Iterator[Tokens]:
        """The tokens of the texts, of which the first is example `first`, counted from 0."""
        try:
            yield from self._special.encoded(texts)
        except UnwrittenToken as error:
            remedy = f"makes a special token of the text of example {first + error.number}; change the row or the model"
            refuse("--model_name_or_path", Described(f"the tokenizer {type(self._tokenizer).__name__}"), remedy)


def _require_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without offsets or without an end token."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        refuse("--model_name_or_path", name, "its tokenizer gives no offsets; use a model with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        refuse("--model_name_or_path", name, "its tokenizer has no end token; set eos_token in tokenizer_config.json")


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


def _with_end(ids: list[int], mask: list[bool], eos: int, *, learn_end: bool) -> tuple[list[int], list[bool]]:
    """End the text with exactly one end token, learned if `learn_end`. The first token is never learned."""
    size = len(ids)
    while size and ids[size - 1] == eos:  # from the template, the answer or the tokenizer, or several
        size -= 1
    ids, mask = [*ids[:size], eos], [*mask[:size], learn_end]
    mask[0] = False
    return ids, mask
