"""Finds the answers in a rendered conversation: what the model would write, from the prompt to the end of each turn.

Most chat templates render a conversation by adding turns to what stands there. Then an answer is what its turn adds
to the prompt before it. Some write a turn in another way when more follow. Qwen3 leaves out the thinking of earlier
turns, Phi-3 ends a text with one more token, and gpt-oss ends the last answer with a token of its own. There the answer
is found by writing a probe in its place: what follows the probe follows the answer too. It is learned as it stands in
the whole conversation, and the prompt before it must be what sampling would give. Calls of tools belong to the answer
that makes them, and a probe is then a call.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from utils.data.special_tokens import SpecialTokens
from utils.data.tool_calls import ARGUMENTS, CALLS, FUNCTION, NAME, Message

Render = Callable[..., str]  # (messages, add_generation_prompt=...) -> text
ROLE, CONTENT, ASSISTANT = "role", "content", "assistant"


class AnswerNotFound(Exception):
    """The template does not show where an answer begins or ends. Its message is the reason, without text of the row."""


def find_answers(
    messages: Sequence[Message], render: Render, tokens: SpecialTokens, learned_from: int = 0
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, up to the end of its last answer, and (start, end) of each answer in characters.

    Args:
        messages: the turns, with stand-ins for typed special tokens.
        render: the chat template.
        tokens: the tokenizer's special tokens.
        learned_from: index of the first turn that may be an answer. Assistant turns before it are not learned.

    Raises:
        AnswerNotFound: see there.
    """
    text = render(messages, add_generation_prompt=False)
    turns = [turn for turn, one in enumerate(messages) if one[ROLE] == ASSISTANT and turn >= learned_from]
    answers = [_answer(text, messages, turn, render, tokens) for turn in turns]
    return (text[: answers[-1][1]] if answers else text), answers


def end_of_turn(text: str, eos_token: str | None) -> int:
    """Where `text` ends without white space after a final end token; its length if it has no end token."""
    stripped = text.rstrip()
    return len(stripped) if eos_token and stripped.endswith(eos_token) else len(text)


def _answer(
    text: str, messages: Sequence[Message], turn: int, render: Render, tokens: SpecialTokens
) -> tuple[int, int]:
    """(start, end) of the answer at `turn`."""
    before = render(messages[:turn], add_generation_prompt=True) if turn else None  # nothing precedes a greeting
    if before is not None:
        through = render(messages[: turn + 1], add_generation_prompt=False)
        if text.startswith(through) and through.startswith(before):
            return len(before), len(before) + end_of_turn(through[len(before) :], tokens.eos_token)
    if messages[turn].get(CALLS):
        return _with_calls(text, before, messages, turn, render, tokens)
    head, rest = _around_probe(messages, turn, render, len(messages))
    start = _start(text, before, head, turn)
    stop = len(text) - len(rest)
    if not text.endswith(rest) or stop < start:
        raise _not_found(f"what follows message {turn + 1}")
    _, alone = _around_probe(messages, turn, render, turn + 1)
    end = stop + _shared_end(rest, alone, tokens)
    return start, start + end_of_turn(text[start:end], tokens.eos_token)


def _with_calls(
    text: str, before: str | None, messages: Sequence[Message], turn: int, render: Render, tokens: SpecialTokens
) -> tuple[int, int]:
    """(start, end) of an answer that calls tools: from the prompt to what follows when it makes another call."""
    head, rest = _around_probe(messages, turn, render, len(messages))
    _, alone = _around_probe(messages, turn, render, turn + 1)
    start = _start(text, before, head, turn)
    follows = rest[_shared_end(rest, alone, tokens) :]
    answer = text[start : len(text) - len(follows)]
    if not text.endswith(follows) or not all(call[FUNCTION][NAME] in answer for call in messages[turn][CALLS]):
        raise _not_found(f"the calls of message {turn + 1}")
    return start, start + end_of_turn(answer, tokens.eos_token)


def _start(text: str, before: str | None, head: str, turn: int) -> int:
    """Where the answer at `turn` begins: after the prompt `before` it, or, for a greeting, after its header."""
    prompt = head if before is None else before
    if text.startswith(prompt):
        return len(prompt)
    what = "the generation prompt" if prompt.startswith(head) else "the turns"
    raise _not_found(f"{what} before message {turn + 1}")


def _around_probe(messages: Sequence[Message], turn: int, render: Render, count: int) -> tuple[str, str]:
    """What the template writes before and after the content of `turn`, or its call, if there are `count` messages."""
    probe = f"answer{secrets.randbelow(10**15):015}"
    called = messages[turn].get(CALLS)
    change: dict[str, Any] = {CONTENT: probe}
    if called:
        change = {CALLS: [{**called[-1], FUNCTION: {NAME: probe, ARGUMENTS: {}}}]}
    probed = [{**one, **change} if at == turn else one for at, one in enumerate(messages[:count])]
    head, found, rest = render(probed, add_generation_prompt=False).partition(probe)
    if not found or probe in rest:
        raise _not_found(f"message {turn + 1}")
    return head, rest


def _shared_end(rest: str, alone: str, tokens: SpecialTokens) -> int:
    """How much of `rest` after an answer is its end: what also stands there if the answer is the last turn.

    Where the two differ, only whole special tokens count, as any other text may belong to the next turn.
    """
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(rest, alone, strict=False)))
    return len(shared) if shared == alone else tokens.last_end(shared)


def _not_found(what: str) -> AnswerNotFound:
    told = f"the chat template writes {what} differently when more follow"
    return AnswerNotFound(f"{told}, so the answer cannot be found")
