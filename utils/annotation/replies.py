"""Read an endpoint's reply to one instruction: an answer, or the reason why there is none.

This reads the raw body, not a client's types, which fill in fields that a server left out. A reason never quotes the
reply, because reasons are printed and counted, and a reply may repeat the instruction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from utils.files.cells import is_text

# Values of finish_reason for a complete answer; some servers give none.
_ENDED = ("stop", "eos_token", "stop_sequence", None)
_NOT_ENDED = {
    "length": "cut off at the token limit (finish_reason length)",
    "content_filter": "stopped by the endpoint's content filter",
    "tool_calls": "a tool call instead of an answer",
    "function_call": "a tool call instead of an answer",
}


@dataclass(frozen=True)
class Reply:
    """One reply.

    Attributes:
        answer: the text; None if there is no usable one.
        reason: why there is no answer; None if there is one.
        model: the model that answered, as the endpoint names it.
        prompt_tokens, completion_tokens: as the endpoint counts them; None if it does not.
    """

    answer: str | None = None
    reason: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def read_reply(body: bytes) -> Reply:
    """The reply in the body of a chat completion (HTTP 200).

    >>> read_reply(b'{"choices": [{"message": {"content": "Four."}, "finish_reason": "stop"}]}').answer
    'Four.'
    >>> read_reply(b"<html>").reason
    'the body is not JSON'
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return Reply(reason="the body is not JSON")
    if not isinstance(content, dict):
        return Reply(reason="the body is not a JSON object")
    answer, reason = _answer(content)
    usage = content.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    model = content.get("model")
    return Reply(
        answer=answer,
        reason=reason,
        model=model if isinstance(model, str) and is_text(model) else None,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
    )


def _answer(content: Mapping[str, object]) -> tuple[str | None, str | None]:
    """(answer, reason) of a body; one of them is None."""
    choices = content.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return None, "no choices in the body"
    ended = choice.get("finish_reason")
    if ended not in _ENDED:
        return None, _NOT_ENDED.get(ended, "an unknown finish_reason") if isinstance(ended, str) else "no finish_reason"
    text = message.get("content")
    if text is None:
        return None, "a refusal without content" if message.get("refusal") else "no content"
    if not isinstance(text, str) or not is_text(text):
        return None, "the content is not text"
    return (text, None) if text.strip() else (None, "blank content")


def _count(value: object) -> int | None:
    """`value` if it is a number of tokens, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
