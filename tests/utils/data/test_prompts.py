"""Prompts: the one function that training and inference share."""

from __future__ import annotations

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import tiny_tokenizer
from utils.data.prompts import PUBMED_PROMPT, ChatTemplateError, format_prompt, render_chat


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.mark.parametrize(
    ("instruction", "prompt"),
    [
        ("Name a colour.", "Name a colour.\n"),
        ("Name a colour.\n", "Name a colour.\n"),
        (PUBMED_PROMPT, "Abstract: "),
        ("Q:\t", "Q:\t"),
        ("", ""),
    ],
)
def test_plain_puts_the_answer_on_a_new_line(instruction: str, prompt: str) -> None:
    assert format_prompt(instruction) == prompt


def test_chat_is_the_template_up_to_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert format_prompt("Hello", "chat", tokenizer) == "<|user|>\nHello</s>\n<|assistant|>\n"


def test_chat_without_a_template_is_refused() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(InvalidArgument, match=r"--prompt_style='chat'.*plain"):
        format_prompt("Hello", "chat", bare)
    with pytest.raises(InvalidArgument, match="--prompt_style"):
        format_prompt("Hello", "chat")


def test_vicuna_is_what_fastchat_writes() -> None:
    """FastChat joins its prompt as `SYSTEM USER: question ASSISTANT:`, and ` answer` after it in training."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    assert format_prompt("Why is the sky blue?", "vicuna") == f"{system} USER: Why is the sky blue? ASSISTANT: "


def test_unconditional_generation_has_no_prompt_and_loses_no_instruction() -> None:
    assert format_prompt("", "uncond_generation") == ""
    with pytest.raises(InvalidArgument, match=r"^--prompt_style='uncond_generation': takes no .* ` #### n`") as refused:
        format_prompt("a private instruction", "uncond_generation")
    assert "private" not in str(refused.value)


def test_a_rendered_prompt_stays_as_it_is() -> None:
    assert format_prompt("<s>[INST] a [/INST]", "as_is") == "<s>[INST] a [/INST]"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('secret') }}", "refuses these turns"),
        ("{{ 1 // 0 }}", "fails on this conversation"),
    ],
)
def test_what_a_template_raises_is_told_without_its_text(template: str, told: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=told) as caught:
        format_prompt("Hello", "chat", tokenizer)
    assert "secret" not in str(caught.value)


def test_unknown_style_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"--prompt_style='alpaca': give one of plain, chat"):
        format_prompt("Hello", "alpaca")


@pytest.mark.parametrize("tokenizer_adds_bos", [True, False])
def test_exactly_one_start_token(tokenizer_adds_bos: bool) -> None:
    """A template that writes the start token, with a tokenizer that adds one and with one that does not."""
    tokenizer = tiny_tokenizer()
    if tokenizer_adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    text = render_chat([{"role": "user", "content": "Hello"}], tokenizer, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
