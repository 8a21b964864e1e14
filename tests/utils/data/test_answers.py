"""Answers in rendered conversations, with templates that write a turn by its place among the others."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer
from utils.data.answers import AnswerNotFound, end_of_turn, find_answers
from utils.data.prompts import render_chat
from utils.data.special_tokens import SpecialTokens

# What these models' templates do with text, in few words.
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- if loop.index0 > ns.last and (loop.last or '</think>' in m.content) %}"
    "{%- set thought = m.content.split('</think>')[0] if '</think>' in m.content else '<think>\n\n' %}"
    "{{- thought + '</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GPT_OSS = (
    "{%- for m in messages %}{{- '<|start|>' + m.role }}"
    "{%- if m.role == 'assistant' %}{{- '<|channel|>final' }}{%- endif %}{{- '<|message|>' + m.content }}"
    "{%- if m.role == 'assistant' and loop.last and not add_generation_prompt %}{{- '<|return|>' }}"
    "{%- else %}{{- '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
DEEPSEEK = (
    "{{- bos_token }}{%- set ns = namespace(asked=false) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.asked = true %}{{- '<|User|>' + m.content }}{%- endif %}"
    "{%- if m.role == 'assistant' %}{%- if ns.asked %}{{- '<|Assistant|></think>' }}{%- endif %}"
    "{%- set ns.asked = false %}{{- m.content.split('</think>')[-1] + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt and ns.asked %}{{- '<|Assistant|></think>' }}{%- endif %}"
)
REASONING = (  # as DeepSeek-R1's: the prompt begins the thinking, which no answer of a file begins with
    "{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content + eos_token }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|><think>\n' }}{%- endif %}"
)
NAMES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
)
CHAT = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"), ("assistant", "Bye you"), ("user", "still here")]


def found(template: str, turns: list[tuple[str, str]] = CHAT) -> tuple[str, list[str], list[str]]:
    """(the text, the answers, and what stands before each)."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in (*NAMES, "<|return|>")])
    tokenizer.chat_template = template
    messages = [{"role": role, "content": content} for role, content in turns]
    text, spans = find_answers(messages, partial(render_chat, tokenizer=tokenizer), SpecialTokens(tokenizer))
    for turn, (start, _) in zip(
        [n for n, (role, _) in enumerate(turns) if role == "assistant" and n], spans, strict=False
    ):
        if turns[0][0] != "assistant":
            prompt = render_chat(messages[:turn], tokenizer, add_generation_prompt=True)
            assert text[:start] == prompt, "an answer stands behind the prompt that sampling gives"
    return text, [text[start:end] for start, end in spans], [text[:start] for start, _ in spans]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHAT_TEMPLATE, ["Yes?</s>", "Bye you</s>"]),
        (QWEN3, ["Yes?<|im_end|>\n", "Bye you<|im_end|>\n"]),
        (PHI3, ["Yes?<|end|>", "Bye you<|end|>"]),
        (GPT_OSS, ["<|channel|>final<|message|>Yes?", "<|channel|>final<|message|>Bye you"]),
        (DEEPSEEK, ["Yes?</s>", "Bye you</s>"]),
    ],
    ids=["usual", "qwen3", "phi3", "gpt-oss", "deepseek"],
)
def test_every_answer_is_found_where_more_follows(template: str, answers: list[str]) -> None:
    text, learned, _ = found(template)
    assert learned == answers
    assert text.endswith(answers[-1])
    assert "still here" not in text


@pytest.mark.parametrize(
    ("template", "last"),
    [
        (CHAT_TEMPLATE, "Bye you</s>"),
        (QWEN3, "<think>\n\n</think>\n\nBye you<|im_end|>\n"),
        (PHI3, "Bye you<|end|>\n</s>"),
        (GPT_OSS, "<|channel|>final<|message|>Bye you<|return|>"),
        (DEEPSEEK, "Bye you</s>"),
    ],
    ids=["usual", "qwen3", "phi3", "gpt-oss", "deepseek"],
)
def test_the_last_turn_is_learned_as_the_template_ends_it(template: str, last: str) -> None:
    assert found(template, CHAT[:4])[1][-1] == last
    assert found(template, CHAT[2:4])[1] == [last], "one turn alone"


def test_thinking_that_the_template_drops_from_earlier_turns_is_not_learned() -> None:
    turns = [
        (role, f"<think>so</think>\n\n{content}" if role == "assistant" else content) for role, content in CHAT[:4]
    ]
    assert found(QWEN3, turns)[1] == ["Yes?<|im_end|>\n", "<think>so</think>\n\nBye you<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "greeting"),
    [(CHAT_TEMPLATE, "Welcome!</s>"), (PHI3, "Welcome!<|end|>"), (DEEPSEEK, "Welcome!</s>")],
)
def test_a_greeting_is_learned_like_other_answers(template: str, greeting: str) -> None:
    _, learned, before = found(template, [("assistant", "Welcome!"), *CHAT])
    assert learned[0] == greeting
    assert before[0].removeprefix("<s>") in ("<|assistant|>\n", "")
    assert len(learned) == 3


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "the turns before message 2"),
        ("{% for m in messages %}{{ m.content if loop.last else '...' }}{% endfor %}", "message 2"),
        ("{% for m in messages %}{{ m.content | upper }}{{ messages | length }}{% endfor %}", "message 2"),
        (REASONING, "the generation prompt before message 2"),
    ],
)
def test_the_reason_for_an_answer_that_is_not_found_is_true(template: str, what: str) -> None:
    with pytest.raises(AnswerNotFound, match=f"^the chat template writes {what} differently when more follow"):
        found(template)


@pytest.mark.parametrize(
    ("text", "end"), [("a</s>", 5), ("a</s>\n", 5), ("a \n", 3), ("", 0)], ids=["end", "white", "none", "empty"]
)
def test_white_space_after_a_final_end_token_is_no_part_of_a_turn(text: str, end: int) -> None:
    assert end_of_turn(text, "</s>") == end
    assert end_of_turn(text, None) == len(text)
