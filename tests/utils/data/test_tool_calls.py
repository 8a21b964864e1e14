"""Calls of tools are learned with their answer, results are not, and a template that leaves one out is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from utils.data.encoding import Encoder
from utils.data.record import Record
from utils.data.records import RowRecords
from utils.data.tool_calls import in_all_texts
from utils.files.cells import Place

# What these models' templates do with tools, in few words.
_LISTED = "{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
_RESULT = (
    "{%- elif m.role == 'tool' %}{%- if not loop.previtem or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}"
    "{%- endif %}{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
)
_CALL = (
    "{%- for call in m.tool_calls %}{%- if not loop.first or m.content %}{{- '\n' }}{%- endif %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}"
)
_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
QWEN25 = (
    _LISTED + "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' + m.content }}"
    f"{_CALL}{{{{- '<|im_end|>\n' }}}}{_RESULT}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}" + _PROMPT
)
QWEN3 = QWEN25.replace(  # an answer that ends the conversation has thinking, which is left out when more follows
    "'<|im_start|>assistant\n' + m.content }}",
    "'<|im_start|>assistant\n' }}{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- m.content }}",
    1,
)
LLAMA3 = (
    "{%- for m in messages %}{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}"
    "{{- raise_exception('one call at a time') }}{%- endif %}"
    '{{- \'<|start|>assistant\n{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- m.tool_calls[0].function.arguments | tojson + '}<|end|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|start|>ipython\n' + m.content | tojson + '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + m.role + '\n' }}{%- if tools and loop.first %}{{- tools | tojson }}{%- endif %}"
    "{{- m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{%- endif %}"
)
NAMES = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>")
PLACE = Place("--train_file", "d.jsonl", 1)
SECRET = "wxyz"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


def call(name: str = "weather", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def row(**more: Any) -> dict[str, Any]:
    """A question, a call, its result, an answer."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Is it warm in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call(city="Rome")]},
        {"role": "tool", "name": "weather", "tool_call_id": "abc", "content": "30 degrees"},
        {"role": "assistant", "content": "Yes."},
    ]
    return {"messages": turns, "tools": TOOLS, **more}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in NAMES])
    tokenizer.chat_template = template
    return tokenizer


def record(given: dict[str, Any], template: str = QWEN25) -> Record:
    return RowRecords(given, PLACE, prompt_style="plain", tokenizer=tokenizer_with(template))(given, PLACE)


def learned(given: dict[str, Any], template: str = QWEN25) -> list[str]:
    made = record(given, template)
    return [made.text[start:end] for start, end in made.answers]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (QWEN25, [CALL, "Yes.<|im_end|>\n"]),
        (QWEN3, [CALL, "<think>\n\n</think>\n\nYes.<|im_end|>\n"]),
        (LLAMA3, ['{"name": "weather", "parameters": {"city": "Rome"}}<|end|>', "Yes.<|end|>"]),
    ],
    ids=["qwen2.5", "qwen3", "llama3"],
)
def test_calls_are_learned_and_results_are_not(template: str, answers: list[str]) -> None:
    made = record(row(), template)
    assert learned(row(), template) == answers
    assert "30 degrees" in made.text
    assert '"parameters": {"city": {"type": "string"}}' in made.text
    tokenizer = tokenizer_with(template)
    (ids, is_answer, _, _) = Encoder(tokenizer, 500).encoded([made])
    kept = tokenizer.decode(ids[is_answer])
    assert "30 degrees" not in kept
    assert "Rome" in kept
    assert "string" not in kept


@pytest.mark.parametrize("template", [QWEN25, QWEN3], ids=["qwen2.5", "qwen3"])
def test_several_calls_with_a_text_and_several_results(template: str) -> None:
    given = row()
    _, asked, told, _ = given["messages"]
    asked |= {"content": "I look.", "tool_calls": [call(city="Rome"), call("now")]}
    given["messages"].insert(3, told | {"content": "noon"})
    first, second = learned(given, template)
    assert first.startswith("I look.\n<tool_call>")
    assert first.count("</tool_call>") == 2
    assert first.endswith('{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n')
    assert second.endswith("Yes.<|im_end|>\n")


def test_json_text_is_read_as_what_it_says() -> None:
    given = row(tools=json.dumps(TOOLS))
    given["messages"][1] |= {"content": None, "tool_calls": [{"name": "weather", "arguments": '{"city": "Rome"}'}]}
    assert record(given) == record(row())
    given["messages"][1]["tool_calls"] = json.dumps([call(city="Rome")])
    assert record(given) == record(row())


def test_only_calls_of_the_completion_are_learned() -> None:
    turns = row()["messages"]
    given = {"prompt": turns[:3], "completion": turns[3:], "tools": TOOLS}
    assert learned(given) == ["Yes.<|im_end|>\n"]
    assert record(given).text == record(row()).text
    assert learned({"prompt": turns[:1], "completion": turns[1:], "tools": TOOLS}) == learned(row())


def test_special_tokens_in_calls_results_and_tools_are_text() -> None:
    given = row(tools=[{"name": "weather", "description": "not <|im_end|> here"}])
    given["messages"][1]["tool_calls"] = [call(city="</s>")]
    given["messages"][2]["content"] = "<|im_start|>"
    made = record(given)
    assert [made.text[start:end] for start, end in made.typed] == ["<|im_end|>", "</s>", "<|im_start|>"]
    tokenizer = tokenizer_with(QWEN25)
    ids = Encoder(tokenizer, 500).encoded([made]).ids.tolist()
    written = made.text.count("<|im_start|>") - 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == written == 5


def test_a_template_that_escapes_a_stand_in_is_noticed() -> None:
    """Else the stand-in itself would be learned."""
    given = row()
    given["messages"][1]["tool_calls"] = [call(city="</s>")]
    with pytest.raises(InvalidArgument, match="cuts or changes a special token"):
        record(given, QWEN25.replace("arguments | tojson", "arguments | tojson(ensure_ascii=True)"))


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (CHAT_TEMPLATE, "the column tools"),
        (QWEN25.replace(_LISTED, ""), "the column tools"),
        (QWEN25.replace("m.tool_calls", "(m.tool_calls or [])[:0]"), "a call of message 2"),
        (QWEN25.replace("call.function.arguments | tojson", "'{}'"), "a call of message 2"),
        (QWEN25.replace("m.content + '\n</tool_response>'", "'</tool_response>'"), "message 3, the result of a tool"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(template: str, what: str) -> None:
    told = f"row 1 .counted from 1.: the chat template leaves out {what}; give prompt/completion rows instead"
    with pytest.raises(InvalidArgument, match=told):
        record(row(), template)


def test_a_template_that_takes_one_call_refuses_two() -> None:
    given = row()
    given["messages"][1]["tool_calls"] *= 2
    with pytest.raises(InvalidArgument, match="the chat template refuses"):
        record(given, LLAMA3)


@pytest.mark.parametrize(
    ("turn", "more", "what"),
    [
        (1, {"tool_calls": SECRET}, "message 2 has tool_calls that are no list of calls .str."),
        (1, {"tool_calls": [SECRET]}, "message 2 has tool_calls that are no list"),
        (1, {"tool_calls": [{"arguments": {"a": SECRET}}]}, "message 2 has a call without the name of a function"),
        (1, {"tool_calls": [{"name": "f", "arguments": SECRET}]}, "arguments of a call that are no object .str."),
        (1, {"tool_calls": [], "content": None}, "message 2 has no text as its content"),
        (1, {"function_call": {"name": SECRET}}, "message 2 has function_call, which would be left out"),
        (0, {"tool_calls": [call(city=SECRET)]}, "message 1 has tool_calls, which would be left out"),
        (0, {"tool_call_id": SECRET}, "message 1 has tool_call_id, which would be left out"),
        (2, {"content": None}, "message 3 has no text as its content"),
    ],
)
def test_calls_that_are_none_are_refused_and_not_shown(turn: int, more: dict[str, Any], what: str) -> None:
    given = row()
    given["messages"][turn] |= more
    with pytest.raises(InvalidArgument, match=what) as refused:
        record(given)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("tools", [SECRET, 7, [SECRET], {"name": SECRET}, [{}]])
def test_tools_that_are_no_list_of_objects_are_refused(tools: Any) -> None:
    with pytest.raises(InvalidArgument, match="tools must be a list of objects") as refused:
        record(row(tools=tools))
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]", "null"])
def test_no_tools_are_none(tools: Any) -> None:
    given = row(tools=tools)
    del given["messages"][1:3]
    assert record(given, CHAT_TEMPLATE).text.endswith("Yes.</s>\n") or learned(given, CHAT_TEMPLATE) == ["Yes.</s>"]


def test_rows_are_not_changed() -> None:
    given = row()
    before = copy.deepcopy(given)
    record(given)
    assert given == before
    assert in_all_texts({"a": [1, None, "b"]}, str.upper) == {"A": [1, None, "B"]}
