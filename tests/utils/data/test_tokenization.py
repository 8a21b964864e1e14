"""Which tokens are learned, cutting, padding and the fingerprint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tokenizer_kinds import ending_where_unknown
from utils.data.prompts import format_prompt
from utils.data.record import Record, RecordMaker, prompt_and_answer
from utils.data.tokenization import TokenizedDataset, tokenize

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def with_bos(tokenizer: PreTrainedTokenizerFast, single: str) -> PreTrainedTokenizerFast:
    """The tokenizer with special tokens added around the text, as Llama's are."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def learned(record: Record, tokenizer: PreTrainedTokenizerFast = TOKENIZER, block_size: int = 512) -> list[str]:
    """The tokens whose loss counts, decoded one by one."""
    labels = tokenize([record], tokenizer, block_size).batch([0], 0)["labels"][0]
    return [tokenizer.decode([i]) for i in labels[labels != -100]]


def test_a_token_across_the_border_is_learned() -> None:
    """'Abstract: The' has one token for ' The': tokenised apart, the prompt would end in a space of its own."""
    record = prompt_and_answer("Abstract: ", "The cat")
    assert [TOKENIZER.decode([i]) for i in TOKENIZER(record.text)["input_ids"]][:3] == ["Abstract", ":", " The"]
    assert "".join(learned(record)) == " The cat</s>"
    assert learned(record)[0] == " The"


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=20), answer=st.text(max_size=20))
def test_learned_tokens_against_characters_one_by_one(prompt: str, answer: str) -> None:
    """Oracle: a token is learned when one of the characters it covers is the answer's, but never as the first."""
    record = prompt_and_answer("x" + prompt, answer)
    assume(not record.text.rstrip().endswith("</s>"))
    offsets = TOKENIZER(record.text, return_offsets_mapping=True)["offset_mapping"]
    spans = [set(range(start, end)) & set(range(*record.answers[0])) for start, end in offsets]
    expected = [bool(common) for common in spans] + [True]
    expected[0] = False
    assert tokenize([record], TOKENIZER, 512).is_answer.tolist() == expected


def test_runs_of_spaces_are_learned_where_offsets_are_trimmed() -> None:
    """GPT-2 and Llama 3 give tokens of spaces no width; indentation is part of an answer all the same."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    record = prompt_and_answer("a    b ", "c    d  ")
    widths = [end - start for start, end in tokenizer(record.text, return_offsets_mapping=True)["offset_mapping"]]
    assert 0 in widths
    assert "".join(learned(record, tokenizer)) == " c    d  </s>"


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("answer", ["The cat", "The cat</s>", "The cat</s>\n", "", "The cat </s></s>"])
def test_exactly_one_learned_end_token_and_no_learned_start(single: str, answer: str) -> None:
    tokenizer = with_bos(tiny_tokenizer(), single)
    data = tokenize([prompt_and_answer("Hello\n", answer)], tokenizer, 512)
    batch = data.batch([0], 0)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids.count(EOS) == 1
    assert ids[-1] == labels[-1] == EOS
    assert labels[0] == -100
    assert tokenizer.bos_token_id not in labels


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_typed_end_token_is_learned_as_text_and_a_prompt_keeps_one_start_token(single: str) -> None:
    tokenizer = with_bos(tiny_tokenizer(), single)
    record = RecordMaker(tokenizer).completed("<s>Say ", "</s> you </s>")
    ids = tokenize([record], tokenizer, 512).ids.tolist()
    assert (ids.count(EOS), ids.count(tokenizer.bos_token_id)) == (1, 1)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, EOS)
    assert "".join(learned(record, tokenizer)) == "</s> you </s>"


def test_every_turn_of_a_conversation_is_learned_and_only_that() -> None:
    text = "<|user|>\nHi</s>\n<|assistant|>\nYes</s>\n<|user|>\nBye</s>\n<|assistant|>\nBye</s>"
    spans = [(text.index("Yes"), text.index("Yes") + 7), (len(text) - 7, len(text))]
    assert "".join(learned(Record(text, tuple(spans)))) == "Yes</s>Bye</s>"


def test_training_prefix_is_the_prompt_of_inference() -> None:
    """What stands before the first learned token is what inference feeds (but for a space merged into the answer)."""
    for style in ("plain", "chat"):
        prompt = format_prompt("Hello, how are you", style, TOKENIZER)
        data = tokenize([prompt_and_answer(prompt, "I am fine")], TOKENIZER, 512)
        first = int(np.argmax(data.is_answer))
        assert data.ids[:first].tolist() == TOKENIZER(prompt)["input_ids"]


def test_cutting_keeps_answerless_examples() -> None:
    records = [
        prompt_and_answer("The cat sat on the mat. ", "A dog"),
        prompt_and_answer("Hello", "!"),
        prompt_and_answer("Hello", "A dog ran over the hill"),
    ]
    whole = tokenize(records, TOKENIZER, 512)
    data = tokenize(records, TOKENIZER, 4)
    assert len(data) == 3
    assert data.lengths.tolist() == [min(4, n) for n in whole.lengths]
    assert data.num_cut == int((whole.lengths > 4).sum()) > 0
    assert data.num_without_answer == 1
    assert data.num_answer_tokens[0] == 0
    assert (data.batch([0], 0)["labels"] == -100).all()
    assert whole.num_cut == whole.num_without_answer == 0


def test_an_example_without_any_answer_has_no_learned_end() -> None:
    data = tokenize([Record("<|user|>\nHi</s>\n", ()), Record("", ()), prompt_and_answer("", "")], TOKENIZER, 512)
    assert data.num_answer_tokens.tolist() == [0, 0, 0]  # the last one's end token is its first: nothing precedes it
    assert data.lengths.min() >= 1
    assert len(data) == data.num_without_answer == 3


def test_lengths_and_counts_equal_the_labels() -> None:
    data = tokenize([prompt_and_answer("Hello ", "you " * n) for n in (0, 3, 1)], TOKENIZER, 512)
    assert data.lengths.dtype == np.int64
    for i in range(3):
        batch = data.batch([i], 0)
        assert batch["input_ids"].shape == (1, data.lengths[i])
        assert int((batch["labels"] != -100).sum()) == data.num_answer_tokens[i]
    assert data.num_answer_tokens[1] > data.num_answer_tokens[2] > data.num_answer_tokens[0] == 1


def test_batch_pads_right_and_keeps_order() -> None:
    data = tokenize([prompt_and_answer("Hello ", "you " * n) for n in (1, 6, 3)], TOKENIZER, 512)
    batch = data.batch([2, 1, 2], pad_token_id=7)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["labels"].shape == (3, data.lengths[1])
    size = int(data.lengths[2])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][2])
    assert batch["input_ids"][0, :size].tolist() == data.ids[data.starts[2] : data.starts[3]].tolist()
    assert (batch["input_ids"][0, size:] == 7).all()
    assert (batch["labels"][0, size:] == -100).all()
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])


def test_padding_changes_no_real_token_without_a_mask() -> None:
    """The claim that lets the batch do without an attention mask."""
    data = tokenize([prompt_and_answer("Hello ", "you"), prompt_and_answer("Hello ", "you " * 9)], TOKENIZER, 512)
    model, size = tiny_llama(), int(data.lengths[0])
    with torch.no_grad():
        alone = model(input_ids=data.batch([0], 0)["input_ids"]).logits
        padded = model(input_ids=data.batch([0, 1], 5)["input_ids"]).logits[:1, :size]
    torch.testing.assert_close(alone, padded)


@pytest.mark.parametrize("indices", [[], np.array([], dtype=np.int64)])
def test_no_indices_give_a_dummy_row_with_nothing_to_learn(indices: list[int] | np.ndarray) -> None:
    batch = tokenize([prompt_and_answer("Hello ", "you")], TOKENIZER, 512).batch(indices, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[3, 3]]
    assert batch["labels"].tolist() == [[-100, -100]]


def test_fingerprint_depends_on_ids_labels_borders_and_order() -> None:
    def print_of(*records: Record) -> str:
        return tokenize(records, TOKENIZER, 512).fingerprint()

    a, b = prompt_and_answer("Hello ", "you"), prompt_and_answer("The ", "cat")
    assert print_of(a, b) == print_of(a, b)
    others = [
        print_of(b, a),
        print_of(a),
        print_of(a, prompt_and_answer("The cat", "")),
        print_of(a, prompt_and_answer("The ", "dog")),
    ]
    assert len({print_of(a, b), *others}) == 5
    data = tokenize([a, b], TOKENIZER, 512)
    merged = TokenizedDataset(data.ids, data.is_answer, data.starts[[0, 2]], data.num_cut)
    assert merged.fingerprint() != data.fingerprint()


def test_more_records_than_one_chunk_stay_in_order() -> None:
    data = tokenize([prompt_and_answer("", f"The cat {i}") for i in range(2050)], TOKENIZER, 512)
    assert len(data) == 2050
    assert TOKENIZER.decode(data.batch([2049], 0)["input_ids"][0]) == "<s>The cat 2049</s>"


def test_tokenizers_and_block_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"--block_size=1: .*at least 2"):
        tokenize([prompt_and_answer("a", "b")], TOKENIZER, 1)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(InvalidArgument, match=r"--model_name_or_path.*end token"):
        tokenize([prompt_and_answer("a", "b")], endless, 8)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False
        eos_token_id = 2

    with pytest.raises(InvalidArgument, match=r"--model_name_or_path='Slow'.*tokenizer\.json"):
        tokenize([prompt_and_answer("a", "b")], Slow(), 8)


def test_a_tokenizer_that_makes_end_tokens_of_text_is_refused_by_the_number_of_the_example() -> None:
    tokenizer = ending_where_unknown()
    records = [Record("cat", ((0, 3),))] * 1500
    assert len(tokenize(records, tokenizer, 8)) == 1500
    records[1200] = Record("dog", ((0, 3),))
    match = r"--model_name_or_path=the tokenizer \w+: makes a special token of the text of example 1201; change"
    with pytest.raises(InvalidArgument, match=match) as refused:
        tokenize(records, tokenizer, 8)
    assert "dog" not in str(refused.value)
