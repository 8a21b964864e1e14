"""Chunks of records give the tokens of each record alone; what an encoder refuses names the flag or the example."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from tests.tiny import tiny_tokenizer
from tests.tokenizer_kinds import ending_where_unknown
from utils.data.encoding import Encoder, answer_mask, start_token
from utils.data.record import Record, prompt_and_answer

TOKENIZER = tiny_tokenizer()
RECORDS = [prompt_and_answer("Hello ", "you " * n) for n in (0, 9, 3)] + [
    Record("Hi", ()),
    prompt_and_answer("", "cat"),
]


def test_a_chunk_is_its_records_one_after_another_also_after_a_journey() -> None:
    encoder = Encoder(TOKENIZER, 6)
    whole = pickle.loads(pickle.dumps(encoder)).encoded(RECORDS)
    alone = [encoder.encoded([record]) for record in RECORDS]
    assert (whole.ids.dtype, whole.is_answer.dtype, whole.sizes.dtype) == (np.int32, np.bool_, np.int32)
    assert whole.ids.tolist() == np.concatenate([one.ids for one in alone]).tolist()
    assert whole.is_answer.tolist() == np.concatenate([one.is_answer for one in alone]).tolist()
    assert whole.sizes.tolist() == [len(one.ids) for one in alone]
    assert whole.num_cut == sum(one.num_cut for one in alone) == 2
    assert whole.ids[whole.sizes[:-1].sum()] == start_token(TOKENIZER)  # before an answer that begins the text


def test_no_records_are_no_tokens() -> None:
    assert [len(part) for part in Encoder(TOKENIZER, 6).encoded([])[:3]] == [0, 0, 0]


def test_answers_are_found_by_characters() -> None:
    offsets = np.array([[0, 0], [0, 4], [4, 8], [8, 8], [8, 9]])
    assert answer_mask(offsets, [(5, 8)]).tolist() == [False, False, True, True, False]
    assert answer_mask(offsets, []).tolist() == [False] * 5


def test_an_example_is_named_by_its_number_among_all() -> None:
    """The tokenizer makes its end token of a word that it does not know."""
    encoder = Encoder(ending_where_unknown(), 64)
    with pytest.raises(InvalidArgument, match="makes a special token of the text of example 1002; change"):
        encoder.encoded([Record("cat", ((0, 3),)), Record("dog", ((0, 3),))], first=1000)


def test_a_block_without_room_for_a_prediction_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--block_size=1: give a whole number of at least 2"):
        Encoder(TOKENIZER, 1)
