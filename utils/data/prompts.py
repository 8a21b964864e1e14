"""Turns an instruction into the prompt before the answer.

Training and inference both call `format_prompt`, because a model that is sampled with another prompt than in training
performs badly without any error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from dptune._validate import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNCONDITIONAL = "uncond_generation"
AS_IS, CHAT, PLAIN = "as_is", "chat", "plain"
PROMPT_STYLES = (PLAIN, CHAT, "vicuna", UNCONDITIONAL, AS_IS)
PROMPT_STYLE_OF_ROWS = "prompt_style_of_rows"  # in `run_config.json`: what sampling must use
PUBMED_PROMPT = "Abstract: "
# FastChat's conversation template "vicuna_v1.1" (https://github.com/lm-sys/FastChat, fastchat/conversation.py).
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class ChatTemplateError(Exception):
    """A chat template raised something. The message names its type and shows no text, which may be a record's."""


def format_prompt(instruction: str, style: str = "plain", tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """The text before the answer.

    Args:
        instruction: the instruction; empty for unconditional generation.
        style: "plain" is the instruction and a line break, unless it is empty or already ends in white space; "chat" is
            the tokenizer's chat template with one user turn, up to the assistant's text; "vicuna" is FastChat's
            vicuna_v1.1 with one user turn, ending in the space that belongs to the answer's first word;
            "uncond_generation" is always empty, for a model that writes instructions itself; "as_is" is the instruction
            unchanged, for instructions that are rendered prompts.
        tokenizer: needed for "chat" only.

    Raises:
        ChatTemplateError: the chat template fails.
        InvalidArgument: the style is unknown, the tokenizer has no chat template for "chat", or "uncond_generation"
            got an instruction, which would be lost (not shown: it may be private).

    >>> format_prompt("Name a colour."), format_prompt("Abstract: "), format_prompt("")
    ('Name a colour.\\n', 'Abstract: ', '')
    >>> format_prompt("Name a colour.", "vicuna").removeprefix(VICUNA_SYSTEM)
    ' USER: Name a colour. ASSISTANT: '
    """
    if style not in PROMPT_STYLES:
        refuse("--prompt_style", style, f"give one of {', '.join(PROMPT_STYLES)}")
    if style == AS_IS:
        return instruction
    if style == "plain":
        return instruction if not instruction or instruction[-1].isspace() else instruction + "\n"
    if style == "vicuna":
        return f"{VICUNA_SYSTEM} USER: {instruction} ASSISTANT: "
    if style == UNCONDITIONAL:
        if instruction:
            refuse("--prompt_style", style, "takes no instruction; give empty ones (lines ` #### n`), or another style")
        return ""
    if tokenizer is None or not has_chat_template(tokenizer):
        refuse("--prompt_style", style, "this tokenizer has no chat template; give plain, or use a chat model")
    return render_chat([{"role": "user", "content": instruction}], tokenizer, add_generation_prompt=True)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `render_chat` works with this tokenizer."""
    return bool(tokenizer.chat_template)


def render_chat(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The conversation as text, by the tokenizer's chat template, which gets the tools too.

    Many templates write the start token, and many tokenizers add one later. In that case the template's token is
    removed, since no model was pre-trained on two start tokens.

    Raises:
        ChatTemplateError: the template raised anything at all.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # templates are programs of strangers
        refuses = type(error) is TemplateError  # raised by the template itself
        what = "refuses these turns" if refuses else "fails on this conversation"
        raise ChatTemplateError(f"the chat template {what} ({type(error).__name__})") from None
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return text.removeprefix(bos)
    return text
