"""Records mark their answers and what people typed."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from utils.data.record import Record, RecordMaker, prompt_and_answer

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye you"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def test_an_answer_follows_its_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = RecordMaker(tokenizer)
    assert maker.instructed("Add.", "5") == prompt_and_answer("Add.\n", "5") == Record("Add.\n5", ((5, 6),))
    assert maker.answered("", "We show.") == prompt_and_answer("", "We show.")


def test_what_spells_a_special_token_is_marked_where_people_typed_it(tokenizer: PreTrainedTokenizerFast) -> None:
    maker = RecordMaker(tokenizer)
    assert maker.instructed("</s>a", "b").typed == ((0, 4),)
    assert RecordMaker(tokenizer, "as_is").instructed("</s>a", "b").typed == ()
    assert maker.completed("</s>a", "<s>b").typed == ((5, 8),)


@pytest.mark.parametrize(("turns", "learned"), [(0, ["Yes?", "Bye you"]), (2, ["Bye you"]), (4, [])])
def test_answers_among_the_first_turns_are_not_learned(
    turns: int, learned: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    found = RecordMaker(tokenizer).conversation(TURNS, learned_from=turns)
    answers = [found.text[first:last] for first, last in found.answers]
    assert [answer.removesuffix("</s>") for answer in answers] == learned
