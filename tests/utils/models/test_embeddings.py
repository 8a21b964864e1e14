"""A model that lacks an embedding of some token is refused before it is loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import tiny_llama, tiny_tokenizer
from utils.models.embeddings import require_embeddings

IDS, STARTS = np.array([1, 5, 2, 1, 7, 9, 2, 3]), np.array([0, 3, 7, 8])  # rows of 3, 4 and 1 tokens


def check(size: int, ids: np.ndarray = IDS, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    with torch.device("meta"):
        model = tiny_llama(vocab_size=size)
    require_embeddings(model, tokenizer or tiny_tokenizer(), "m", {"training example": (ids, STARTS)})


def test_the_largest_token_needs_an_embedding() -> None:
    check(10)
    with pytest.raises(InvalidArgument, match="has token 9, but the model has only 9 embeddings"):
        check(9)


def test_data_without_rows_needs_nothing_and_the_next_data_is_still_looked_at() -> None:
    model, nothing = tiny_llama(vocab_size=10), (IDS[:0], STARTS[:1])
    require_embeddings(model, tiny_tokenizer(), "m", {"training example": nothing})
    one = (np.array([10]), np.array([0, 1]))
    with pytest.raises(InvalidArgument, match=r"held-out example 1 \(counted from 1\) has token 10"):
        require_embeddings(model, tiny_tokenizer(), "m", {"training example": nothing, "held-out example": one})


@pytest.mark.parametrize(("size", "row", "token"), [(9, 2, 9), (7, 2, 7), (5, 1, 5)])
def test_the_first_row_with_another_token_is_named(size: int, row: int, token: int) -> None:
    told = rf"^--model_name_or_path='m': training example {row} \(counted from 1\) has token {token}, but .* {size} emb"
    with pytest.raises(InvalidArgument, match=told):
        check(size)


@pytest.mark.parametrize("place", range(8))
def test_every_place_belongs_to_its_row(place: int) -> None:
    ids = np.where(np.arange(8) == place, 11, 3)
    row = [1, 1, 1, 2, 2, 2, 2, 3][place]
    with pytest.raises(InvalidArgument, match=rf"training example {row} .*token 11, "):
        check(10, ids)
    with pytest.raises(InvalidArgument, match="token -1"):
        check(10, np.where(ids == 11, -1, 3))


def test_a_pad_token_and_an_added_token_are_named() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    with pytest.raises(InvalidArgument, match=rf"has token {size} \(<\|im_end\|>\)"):
        check(size, np.where(IDS == 9, size, IDS), tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(InvalidArgument, match=rf"pads with token {size + 1} \(\[PAD\]\), but .* {size} embeddings"):
        check(size, IDS, tokenizer)
    check(size + 2, IDS, tokenizer)
