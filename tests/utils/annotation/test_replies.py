"""A reply is an answer or a reason, whatever a server sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from utils.annotation.replies import Reply, read_reply


def body(choice: object = None, **more: object) -> bytes:
    whole = {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    return json.dumps(whole | more).encode()


def choice(content: object, ended: object = "stop", **message: object) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content} | message, "finish_reason": ended}


def test_an_answer_is_taken_as_it_stands_with_what_it_cost() -> None:
    assert read_reply(body(choice(" Größe\u2028 4\n"))) == Reply(" Größe\u2028 4\n", None, "m", 3, 2)


@pytest.mark.parametrize("ended", ["stop", "eos_token", "stop_sequence", None])
def test_the_names_under_which_servers_say_that_the_text_ended(ended: str | None) -> None:
    assert read_reply(body(choice("Four.", ended))).answer == "Four."


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "the body is not JSON"),
        (b"<html>busy</html>", "the body is not JSON"),
        (b'{"choices": [{"message": {"content": "cut', "the body is not JSON"),
        (b'{"choices": "\xff"}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[]", "the body is not a JSON object"),
        (b"null", "the body is not a JSON object"),
        (b"{}", "no choices in the body"),
        (body(choices=[]), "no choices in the body"),
        (body(choices=None), "no choices in the body"),
        (body(choices={"0": 1}), "no choices in the body"),
        (body("text"), "no choices in the body"),
        (body({"finish_reason": "stop"}), "no choices in the body"),
        (body({"message": None, "finish_reason": "stop"}), "no choices in the body"),
        (body(choice("Half an ans", "length")), "cut off at the token limit (finish_reason length)"),
        (body(choice("", "content_filter")), "stopped by the endpoint's content filter"),
        (body(choice(None, "tool_calls")), "a tool call instead of an answer"),
        (body(choice("x", "exploded")), "an unknown finish_reason"),
        (body(choice("x", ["stop"])), "no finish_reason"),
        (body(choice(None)), "no content"),
        (body(choice(None, refusal="I may not.")), "a refusal without content"),
        (body(choice("")), "blank content"),
        (body(choice(" \n\u00a0")), "blank content"),
        (body(choice(["part"])), "the content is not text"),
        (body(choice("\ud800")), "the content is not text"),
    ],
)
def test_what_is_no_answer_has_a_reason(sent: bytes, reason: str) -> None:
    reply = read_reply(sent)
    assert (reply.answer, reply.reason) == (None, reason)


def test_a_reply_that_is_set_aside_is_still_counted() -> None:
    assert read_reply(body(choice("Half", "length"))).completion_tokens == 2


@pytest.mark.parametrize(
    "usage", [None, [], {}, {"prompt_tokens": "3", "completion_tokens": -1}, {"prompt_tokens": True}]
)
def test_counts_that_are_none_are_not_made_up(usage: object) -> None:
    reply = read_reply(body(choice("Four."), usage=usage, model=7))
    assert reply == Reply("Four.")
