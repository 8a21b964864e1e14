"""Calls of tools in conversations: what rows may hold, and whether a chat template writes it.

A template that leaves out a call, a tool's result or the list of tools would train on half a conversation. So each of
these is changed once, and the text must change too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from utils.files.cells import Place, is_text

Message = dict[str, Any]
Tools = list[dict[str, Any]]
TOOL, TOOLS, CALLS, FUNCTION, NAME, ARGUMENTS = "tool", "tools", "tool_calls", "function", "name", "arguments"
CALL_ID = "tool_call_id"
_CHANGED = "changed"


class ToolsLeftOut(Exception):
    """The chat template does not write something that belongs to tools. Its message says what, without text of the
    row."""


def tools_of(value: object, place: Place) -> Tools | None:
    """The tools that a row lists in its column `tools`: a list of objects, or that as JSON text. None without any.

    Raises:
        InvalidArgument: it is something else.
    """
    found = _decoded(value)
    if found is None or found == [] or (isinstance(found, str) and not found.strip()):
        return None
    if not isinstance(found, list) or not all(isinstance(one, Mapping) and one for one in found):
        place.refuse(f"{TOOLS} must be a list of objects, or that as JSON text, not {type(found).__name__}")
    return [dict(one) for one in found]


def calls_of(value: object, number: int, place: Place) -> list[dict[str, Any]]:
    """The calls of a message, each as {"type", "function": {"name", "arguments"}}, with its `id` if it has one.

    Args:
        value: a list of such calls, or of {"name", "arguments"}. Arguments are an object, or that as JSON text.
        number: the message's, from 1.
        place: where the row is.

    Raises:
        InvalidArgument: it is something else.
    """
    found = _decoded(value)
    if not isinstance(found, list) or not all(isinstance(call, Mapping) for call in found):
        place.refuse(f"message {number} has {CALLS} that are no list of calls ({type(found).__name__})")
    return [_call(call, number, place) for call in found]


def _call(call: Mapping[str, Any], number: int, place: Place) -> dict[str, Any]:
    function = call.get(FUNCTION, call)
    name = function.get(NAME) if isinstance(function, Mapping) else None
    if not is_text(name) or not name:
        place.refuse(f"message {number} has a call without the name of a function; give {{name, {ARGUMENTS}}}")
    arguments = _decoded(function.get(ARGUMENTS) or {})
    if not isinstance(arguments, Mapping):
        told = f"message {number} has {ARGUMENTS} of a call that are no object ({type(arguments).__name__})"
        place.refuse(f"{told}; give an object, or that as JSON text")
    known = {"id": call["id"]} if is_text(call.get("id")) else {}
    return {**known, "type": FUNCTION, FUNCTION: {NAME: str(name), ARGUMENTS: dict(arguments)}}


def require_written(messages: Sequence[Message], tools: Tools | None, render: Callable[..., str]) -> None:
    """Refuse a chat template that leaves out a tool, a call or a result.

    Args:
        messages, tools: of one conversation.
        render: (messages, tools=..., add_generation_prompt=...) -> text.

    Raises:
        ToolsLeftOut: see there.
    """
    changes = list(_changes(messages, tools))
    if not changes:
        return
    text = render(messages, tools=tools, add_generation_prompt=False)
    for what, other, others_tools in changes:
        if render(other, tools=others_tools, add_generation_prompt=False) == text:
            raise ToolsLeftOut(f"the chat template leaves out {what}")


def _changes(messages: Sequence[Message], tools: Tools | None) -> Iterator[tuple[str, list[Message], Tools | None]]:
    """(what is changed, the messages, the tools) for everything that belongs to tools."""
    if tools is not None:
        yield f"the column {TOOLS}", list(messages), None
    for at, message in enumerate(messages):
        told = f"message {at + 1}"
        if message["role"] == TOOL:
            other = {**message, "content": f"{message['content']}{_CHANGED}"}
            yield f"{told}, the result of a tool", _replaced(messages, at, other), tools
        calls = message.get(CALLS, [])
        for number, call in enumerate(calls):
            function = call[FUNCTION]
            for what in (
                {NAME: f"{function[NAME]}{_CHANGED}"},
                {ARGUMENTS: {**function[ARGUMENTS], _CHANGED: _CHANGED}},
            ):
                changed = _replaced(calls, number, {**call, FUNCTION: {**function, **what}})
                yield f"a call of {told}", _replaced(messages, at, {**message, CALLS: changed}), tools


def _replaced(items: Sequence[dict[str, Any]], at: int, item: dict[str, Any]) -> list[dict[str, Any]]:
    return [*items[:at], item, *items[at + 1 :]]


def in_all_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON value with every text changed, names of objects' members too.

    >>> in_all_texts({"a": ["b", 1]}, str.upper)
    {'A': ['B', 1]}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {in_all_texts(name, change): in_all_texts(one, change) for name, one in value.items()}
    return [in_all_texts(one, change) for one in value] if isinstance(value, list) else value


def _decoded(value: object) -> object:
    """The value of JSON text; anything else as it is. Text that is no JSON stays text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
