"""Texts and pairs as tokens: special tokens, cutting, padding, the dummy, the fingerprint and subsets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import tiny_pair_tokenizer, tiny_tokenizer
from tests.tokenizer_kinds import FAST, ending_where_unknown
from utils.classification.dataset import ClassificationDataset, tokenize_texts
from utils.classification.labelled_texts import LabelledTexts

PAIRS = tiny_pair_tokenizer()
PAD, UNK, CLS, SEP = range(4)
PLAIN = tiny_tokenizer()  # a decoder's: no special tokens around a text, no token types, no padding token


def texts_of(*columns: list[str], labels: list[int] | None = None) -> LabelledTexts:
    return LabelledTexts(columns, np.array(labels or [0] * len(columns[0]), dtype=np.int64))


def words(*ids_of: str) -> list[int]:
    return PAIRS.convert_tokens_to_ids(list(ids_of))


def example(data: ClassificationDataset, index: int) -> list[int]:
    return data.ids[data.starts[index] : data.starts[index + 1]].tolist()


FIRST = ["The cat", "A dog ran over the hill", "you"]
SECOND = ["sat on the mat", "fine", "mat mat"]
DATA = tokenize_texts(texts_of(FIRST, SECOND, labels=[2, 0, 1]), PAIRS, 64)


def test_one_text_and_pairs_as_the_tokenizer_writes_them() -> None:
    single = tokenize_texts(texts_of(["The cat"]), PAIRS, 64)
    assert example(single, 0) == [CLS, *words("The", "cat"), SEP]
    assert single.token_types is not None
    assert single.token_types.tolist() == [0, 0, 0, 0]
    assert example(DATA, 1) == [CLS, *words("A", "dog", "ran", "over", "the", "hill"), SEP, *words("fine"), SEP]
    assert DATA.token_types is not None
    assert DATA.token_types[DATA.starts[1] : DATA.starts[2]].tolist() == [0] * 8 + [1] * 2
    assert DATA.lengths.tolist() == [9, 10, 6]
    assert (len(DATA), DATA.num_cut, DATA.authors) == (3, 0, None)


def test_batch_pads_right_with_a_mask_and_keeps_order() -> None:
    batch = DATA.batch([2, 1, 2], pad_token_id=7)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, 10),
        "attention_mask": (3, 10),
        "token_type_ids": (3, 10),
        "labels": (3,),
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["input_ids"][0].tolist() == [*example(DATA, 2), 7, 7, 7, 7]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0] * 4, [1] * 10, [1] * 6 + [0] * 4]
    assert batch["token_type_ids"].tolist() == [
        [0] * 3 + [1] * 3 + [0] * 4,
        [0] * 8 + [1] * 2,
        [0] * 3 + [1] * 3 + [0] * 4,
    ]


def test_a_row_of_a_batch_depends_on_its_neighbours_in_its_padding_only() -> None:
    for count in (1, 2, 3):
        for indices in itertools.product(range(3), repeat=count):
            batch = DATA.batch(np.array(indices), pad_token_id=PAD)
            for b, index in enumerate(indices):
                alone, size = DATA.batch([index], pad_token_id=PAD), DATA.lengths[index]
                for name in ("input_ids", "attention_mask", "token_type_ids"):
                    assert torch.equal(batch[name][b, :size], alone[name][0])
                    assert not batch[name][b, size:].any()
                assert batch["labels"][b] == alone["labels"][0]


def test_without_token_types_there_are_none() -> None:
    data = tokenize_texts(texts_of(FIRST, SECOND), PLAIN, 64)
    assert data.token_types is None
    assert data.batch([0, 1], 5).keys() == data.batch([], 5).keys() == {"input_ids", "attention_mask", "labels"}
    assert example(data, 0) == PLAIN("The cat", "sat on the mat")["input_ids"]


@pytest.mark.parametrize("indices", [[], np.array([], dtype=np.int64)])
def test_no_indices_give_a_dummy_row_whose_loss_and_gradient_are_zero(indices: list[int] | np.ndarray) -> None:
    batch = DATA.batch(indices, pad_token_id=3)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[3, 3]],
        "attention_mask": [[1, 1]],
        "token_type_ids": [[0, 0]],
        "labels": [-100],
    }
    logits = torch.randn(1, 3, requires_grad=True)
    losses = F.cross_entropy(logits, batch["labels"], reduction="none")
    losses.sum().backward()
    assert losses.tolist() == [0.0]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_of_a_pair_the_longer_text_gives_way_and_special_tokens_stay() -> None:
    data = tokenize_texts(texts_of(FIRST, SECOND), PAIRS, 8)
    assert data.lengths.tolist() == [8, 8, 6]
    assert data.num_cut == 2
    assert example(data, 0) == [CLS, *words("The", "cat"), SEP, *words("sat", "on", "the"), SEP]
    assert example(data, 1) == [CLS, *words("A", "dog", "ran", "over"), SEP, *words("fine"), SEP]
    assert example(data, 2) == example(DATA, 2)
    assert data.token_types is not None
    assert data.token_types[data.starts[1] : data.starts[2]].tolist() == [0] * 6 + [1] * 2


def test_one_text_is_cut_between_its_special_tokens() -> None:
    data = tokenize_texts(texts_of(["A dog ran over the hill", "A dog"]), PAIRS, 4)
    assert [example(data, i) for i in range(2)] == [[CLS, *words("A", "dog"), SEP]] * 2
    assert data.num_cut == 1


@pytest.mark.parametrize("columns", [1, 2])
def test_a_suffix_comes_last_and_is_never_cut(columns: int) -> None:
    suffix = PLAIN("was fine", add_special_tokens=False)["input_ids"]
    texts = texts_of(*[["", "you", *FIRST]] * columns)
    data, without = tokenize_texts(texts, PLAIN, 6 + len(suffix), suffix), tokenize_texts(texts, PLAIN, 6)
    assert data.num_cut == without.num_cut > 0
    for index in range(len(data)):
        assert example(data, index) == [*example(without, index), *suffix]
    with pytest.raises(
        InvalidArgument, match=rf"--block_size=2: special tokens, the suffix .* need {columns + len(suffix)}"
    ):
        tokenize_texts(texts, PLAIN, 2, suffix)
    types = tokenize_texts(texts_of(["The cat"]), PAIRS, 64, suffix).token_types
    assert types is not None
    assert types.tolist() == [0] * (4 + len(suffix))


SOME_TEXT = st.one_of(st.just(""), st.text(max_size=30), st.lists(st.sampled_from(["The", "cat", "dog"])).map(" ".join))


@pytest.mark.parametrize("tokenizer", [PAIRS, PLAIN], ids=["pairs", "plain"])
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(SOME_TEXT, SOME_TEXT), min_size=1, max_size=5), max_length=st.integers(5, 12))
def test_rows_stay_rows_and_equal_the_tokenizer_called_on_each_alone(
    tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]], max_length: int
) -> None:
    data = tokenize_texts(texts_of([a for a, _ in rows], [b for _, b in rows]), tokenizer, max_length)
    assert len(data) == len(data.starts) - 1 == len(rows)
    assert data.lengths.min() >= 1
    for index, (first, second) in enumerate(rows):
        (alone,) = tokenizer([first], [second], truncation="longest_first", max_length=max_length)["input_ids"]
        assert example(data, index) == (alone or [tokenizer.eos_token_id])
    assert data.num_cut == sum(len(tokenizer([a], [b])["input_ids"][0]) > max_length for a, b in rows)


def test_a_special_token_in_a_text_is_text() -> None:
    tokenizer = tiny_tokenizer()
    data = tokenize_texts(LabelledTexts((["a</s>b"],), np.array([0])), tokenizer, 64)
    assert tokenizer.eos_token_id not in data.ids
    assert tokenizer.decode(data.ids) == "a</s>b"


@pytest.mark.parametrize("make", FAST)
@pytest.mark.parametrize("columns", [1, 2])
def test_no_spelling_of_a_special_token_is_one(make, columns: int) -> None:
    tokenizer = make()
    spelled = ["a </s> b", "a\uff1c/s\uff1eb", "[SEP] \uff3bSEP\uff3d", "[sep] <s>", "</s>" * 9]
    data = tokenize_texts(texts_of(*[spelled] * columns), tokenizer, 8)
    (around,) = tokenizer(*[[""]] * columns)["input_ids"]
    special = [tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "[SEP]")]
    for index in range(len(data)):
        assert [number for number in example(data, index) if number in special] == [
            number for number in around if number in special
        ]


def test_a_tokenizer_that_makes_end_tokens_of_text_is_refused_by_the_number_of_the_row() -> None:
    texts = ["cat"] * 1500
    texts[1200] = "dog"
    match = r"--model_name_or_path=the tokenizer \w+: makes a special token of the text of row 1201; change"
    with pytest.raises(InvalidArgument, match=match):
        tokenize_texts(texts_of(texts), ending_where_unknown(), 8)


def test_texts_of_which_nothing_is_left_become_one_token() -> None:
    data = tokenize_texts(texts_of(["", "you"]), PLAIN, 4)
    assert example(data, 0) == [PLAIN.eos_token_id]
    assert tokenize_texts(texts_of(["", "  "]), PAIRS, 4).ids.tolist() == [CLS, SEP, CLS, SEP]
    nothing = tiny_tokenizer()
    nothing.eos_token = None
    assert example(tokenize_texts(texts_of([""]), nothing, 4), 0) == [nothing.unk_token_id]
    nothing.unk_token = None
    with pytest.raises(InvalidArgument, match=r"--model_name_or_path=.*empty text; set eos_token"):
        tokenize_texts(texts_of([""]), nothing, 4)


def test_a_tokenizer_that_pads_on_the_left_changes_nothing() -> None:
    left = tiny_pair_tokenizer()
    left.padding_side = "left"
    left(FIRST, padding=True, truncation=True, max_length=4)  # leaves its settings behind in the tokenizer
    assert tokenize_texts(texts_of(FIRST, SECOND, labels=[2, 0, 1]), left, 64).fingerprint() == DATA.fingerprint()


def test_more_rows_than_one_chunk_stay_in_order() -> None:
    rows = ["The " * (i % 7 + 1) for i in range(2050)]
    data = tokenize_texts(texts_of(rows, labels=list(range(2050))), PAIRS, 6)
    assert data.lengths.tolist() == [min(i % 7 + 3, 6) for i in range(2050)]
    assert data.batch([2049], 0)["labels"].tolist() == [2049]
    assert data.num_cut == sum(i % 7 + 3 > 6 for i in range(2050))


def test_fingerprint_depends_on_ids_labels_types_borders_and_order() -> None:
    def of(*columns: list[str], labels: list[int]) -> ClassificationDataset:
        return tokenize_texts(texts_of(*columns, labels=labels), PAIRS, 64)

    same = of(["The cat", "A dog"], labels=[0, 1])
    others = [
        of(["A dog", "The cat"], labels=[0, 1]),
        of(["The cat", "A dog"], labels=[1, 0]),
        of(["The cat", "A mat"], labels=[0, 1]),
        of(["The cat"], labels=[0]),
        of(["The", "A"], ["cat", "dog"], labels=[0, 1]),
        ClassificationDataset(same.ids, None, same.starts, same.labels, 0),
        ClassificationDataset(same.ids, same.token_types, np.array([0, 3, 8]), same.labels, 0),
    ]
    assert same.fingerprint() == of(["The cat", "A dog"], labels=[0, 1]).fingerprint()
    assert len({data.fingerprint() for data in [same, *others]}) == 8


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 1, 2], [1, 1]])
def test_a_subset_holds_its_examples_in_the_order_given(indices: list[int]) -> None:
    part = DATA.subset(indices)
    assert part.starts.dtype == part.labels.dtype == np.int64
    assert [example(part, i) for i in range(len(part))] == [example(DATA, i) for i in indices]
    everything = part.batch(range(len(indices)), PAD)
    for name, value in DATA.batch(indices, PAD).items():
        assert torch.equal(everything[name], value)


def test_an_empty_subset_and_the_whole() -> None:
    empty = DATA.subset([])
    assert (len(empty), empty.starts.tolist(), empty.ids.tolist()) == (0, [0], [])
    assert DATA.subset([0, 1, 2]).fingerprint() == DATA.fingerprint()


@pytest.mark.parametrize(
    ("columns", "max_length", "error"),
    [
        (1, 1, r"--block_size=1: .*at least 2"),
        (1, 2, r"--block_size=2: .*need 3; give at least that"),
        (2, 4, r"--block_size=4: .*need 5"),
    ],
)
def test_a_length_without_room_for_text_is_refused(columns: int, max_length: int, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        tokenize_texts(texts_of(*[["The cat"]] * columns), PAIRS, max_length)
    assert len(tokenize_texts(texts_of(*[["The cat"]] * columns), PAIRS, 2 * columns + 1)) == 1
