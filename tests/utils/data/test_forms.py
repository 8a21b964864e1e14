"""The forms of other tools give the records of the project's own forms, and nothing of a row is left out unnoticed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import tiny_tokenizer
from utils.data.forms import FORMS, NamedColumns, form_of, joined_input
from utils.data.instruction_files import read_instructions
from utils.data.record import Record
from utils.data.records import RowRecords
from utils.files.cells import Place

PLACE = Place("--train_file", "d.jsonl", 1)
SECRET = "Jane Roe has measles"
TURNS = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"), ("assistant", "Bye you")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SHARED = [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS]
PARTS = [
    {"role": role, "content": [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]}
    for role, text in TURNS
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def record(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, style: str = "plain", **named: str) -> Record:
    return RowRecords(row, PLACE, prompt_style=style, tokenizer=tokenizer, named=NamedColumns(**named))(row, PLACE)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHARED},
        {"conversations": SHARED[1:], "system": "Be kind."},
        {"conversations": MESSAGES},
        {"messages": PARTS},
    ],
)
def test_conversations_of_other_tools_are_messages(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    assert record(row, tokenizer) == record({"messages": MESSAGES}, tokenizer)


def test_of_a_prompt_and_a_completion_in_turns_only_the_completion_is_learned(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    found = record({"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}, tokenizer)
    whole = record({"messages": MESSAGES}, tokenizer)
    assert found.text == whole.text
    assert found.answers == whole.answers[-1:] != whole.answers


@pytest.mark.parametrize("style", ["plain", "chat", "uncond_generation"])
def test_alpacas_rows_have_their_input_below_the_instruction(style: str, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "Translate.", "input": "Bonjour", "output": "Hello", "text": "### Instruction: ..."}
    joined = {"instruction": "Translate.\n\nBonjour", "answer": "Hello"}
    assert record(row, tokenizer, style) == record(joined, tokenizer, style)
    without = {"instruction": "Translate.", "answer": "Hello"}
    for blank in ("", " ", None):
        assert record({**row, "input": blank}, tokenizer, style) == record(without, tokenizer, style)


def test_sampling_joins_an_input_as_training_does(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "Translate.", "input": "Bonjour"}, {"instruction": "Stop."}]')
    assert read_instructions(str(tmp_path / "a.json")).texts == [joined_input("Translate.", "Bonjour"), "Stop."]


def test_a_text_is_learned_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    assert record({"text": "We show.", "id": 3}, tokenizer) == Record("We show.", ((0, 8),))


@pytest.mark.parametrize(
    ("row", "named", "same"),
    [
        ({"q": "a", "a": "b", "text": "c"}, {"prompt": "q", "answer": "a"}, {"instruction": "a", "answer": "b"}),
        ({"body": "b", "instruction": "a", "answer": "c"}, {"text": "body"}, {"text": "b"}),
        ({"chat": MESSAGES}, {"messages": "chat"}, {"messages": MESSAGES}),
        ({"chat": SHARED, "messages": []}, {"messages": "chat"}, {"messages": MESSAGES}),
    ],
)
def test_columns_may_be_called_otherwise(
    row: dict[str, Any], named: dict[str, str], same: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert record(row, tokenizer, **named) == record(same, tokenizer)


def test_a_generator_of_instructions_needs_no_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"question": "Name a colour."}
    found = record(row, tokenizer, "uncond_generation", prompt="question")
    assert found == record({"instruction": "Name a colour."}, tokenizer, "uncond_generation")


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ({"answer": "a"}, "^--answer_column='a': give --prompt_column too"),
        ({"text": "t", "messages": "m"}, "^--messages_column='m': rows have one form, so leave out --text_column"),
        ({"text": "t", "prompt": "p", "answer": "a"}, "^--prompt_column='p': rows have one form"),
    ],
)
def test_columns_of_several_forms_are_refused(named: dict[str, str], what: str) -> None:
    with pytest.raises(InvalidArgument, match=what):
        NamedColumns(**named)


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ({"text": "body"}, "^--text_column='body': no such column in d.jsonl, which has question, reply; name one"),
        ({"prompt": "question"}, "^--prompt_column='question': give --answer_column too"),
        ({}, "found the columns question, reply; name them instruction/answer, or .*--prompt_column and --answer_col"),
    ],
)
def test_rows_of_no_form_are_refused_with_their_columns(named: dict[str, str], what: str) -> None:
    with pytest.raises(InvalidArgument, match=what) as refused:
        form_of({"question": SECRET, "reply": SECRET}, "plain", PLACE, NamedColumns(**named))
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{**MESSAGES[1], "tool_calls": [{"name": SECRET}]}]}, "message 1 has tool_calls, which would be"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": SECRET}]}]}, "a part that is no text"),
        ({"messages": [{"role": "user", "content": [SECRET]}]}, "a part that is no text"),
        ({"conversations": [{"from": SECRET, "value": "a"}]}, "message 1 is from none of human, user, gpt"),
        ({"conversations": [{"from": "human", "value": None}]}, "message 1 has no text as its value"),
        ({"conversations": SECRET}, "conversations must be a list of at least one {from, value}"),
        ({"conversations": SHARED, "system": 7}, "system is not text"),
        ({"conversations": SHARED, "tools": SECRET}, "tools would be left out"),
        ({"prompt": MESSAGES, "completion": []}, "completion must be a list of at least one"),
        ({"instruction": "a", "output": "b", "input": [SECRET]}, "input is not text"),
    ],
)
def test_what_would_be_lost_or_is_no_text_is_refused_and_not_shown(
    row: dict[str, Any], what: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InvalidArgument, match=what) as refused:
        record(row, tokenizer)
    assert SECRET not in str(refused.value)


def test_every_row_of_a_data_set_has_the_form_of_the_first(tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = [{"instruction": "a", "output": "b"}, {"text": "c"}]
    make = RowRecords(rows[0], PLACE, prompt_style="plain", tokenizer=tokenizer)
    assert make(rows[0], PLACE).text == "a\nb"
    with pytest.raises(InvalidArgument, match="instruction is missing"):
        make(rows[1], PLACE)
    assert len(set(chain.from_iterable(form.columns for form in FORMS))) == 8


@pytest.mark.parametrize(
    ("row", "style"),
    [
        ({"instruction": "a", "answer": "b"}, "vicuna"),
        ({"instruction": "a", "output": "b"}, "vicuna"),
        ({"prompt": "a", "completion": "b"}, "as_is"),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:3]}, "chat"),
        ({"messages": MESSAGES}, "chat"),
        ({"conversations": SHARED}, "chat"),
        ({"text": "a"}, "as_is"),
    ],
)
def test_each_form_says_how_sampling_must_ask(
    row: dict[str, Any], style: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert RowRecords(row, PLACE, prompt_style="vicuna", tokenizer=tokenizer).prompt_style == style
