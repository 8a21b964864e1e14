"""A JSON list read value by value gives what Python's own reader gives, errors with their places included."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.files import json_lists
from utils.files.json_lists import JSONList

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=8)


def read(text: str) -> list[Any]:
    values = JSONList(io.StringIO(text), json.JSONDecoder().raw_decode)
    assert values.begins_list()
    return list(values.values())


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, indent=st.sampled_from([None, 0, 3]), part=st.sampled_from([1, 7, 1 << 16]))
def test_every_list_is_read_as_a_whole_one_is(rows: list[Any], indent: int | None, part: int) -> None:
    text = " \n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "_AT_ONCE", part)
        assert read(text) == rows


@pytest.mark.parametrize("part", [1, 5, 1 << 16])
@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1} {"a": 2}]',
        '[{"a": 1},\n {"a": }]',
        '[{"a": 1}, {"b": "x',
        '[{"a": 1}, {"b": "x"}',
        '[{"a": 1},\n\n  {"b": tru }]',
        '[{"a": 1}]\n 7',
        '[\n{"a": 1}, {a: 1}]',
        '[{"a": "\\u12"}]',
        "[",
        "[]]",
    ],
)
def test_what_is_no_json_is_told_with_its_place(text: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "_AT_ONCE", part)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(json.JSONDecodeError) as found:
        read(text)
    assert (found.value.lineno, found.value.colno) == (expected.value.lineno, expected.value.colno)


def test_what_does_not_begin_with_a_bracket_is_no_list() -> None:
    for text in ('{"a": [1]}', "7", "", "  \n"):
        assert not JSONList(io.StringIO(text), json.JSONDecoder().raw_decode).begins_list()


def test_a_long_list_takes_the_memory_of_a_few_values() -> None:
    text = io.StringIO("[" + ",".join(['{"a": "' + "x" * 1000 + '"}'] * 5000) + "]")  # 5 MB
    values = JSONList(text, json.JSONDecoder().raw_decode)
    assert values.begins_list()
    tracemalloc.start()
    try:
        count = sum(1 for _ in values.values())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5000
    assert peak < 1 << 20


def test_a_mistake_early_in_a_long_list_is_told_before_the_rest_is_read() -> None:
    text = io.StringIO('[{"a": 1}, {"a" 2}, ' + '{"a": 1}, ' * 400_000)
    values = JSONList(text, json.JSONDecoder().raw_decode)
    assert values.begins_list()
    with pytest.raises(
        json.JSONDecodeError, match="line 1 column 1 "
    ):  # the message has no text, so no place of its own
        list(values.values())
    assert text.tell() < 1 << 20
