"""A record: the whole text of an example, and which characters of it are the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from utils.data.answers import ROLE, Message, find_answers
from utils.data.prompts import AS_IS, format_prompt, render_chat
from utils.data.special_tokens import Spans, SpecialTokens
from utils.data.tool_calls import Tools, in_all_texts, require_written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        text: the whole text, prompt and answer.
        answers: (start, end) of each answer in characters of `text`, end excluded, ascending. Empty if there is nothing
            to learn (a conversation without an assistant turn); an empty answer is (n, n).
        author: the row's author, from the column of the privacy unit. None without such a column, or if the row has no
            value there; the row is then a unit by itself.
        typed: (start, end) of what a person typed that spells a special token, ascending. It is text.
    """

    text: str
    answers: Spans
    author: str | None = field(default=None, repr=False)
    typed: Spans = field(default=(), repr=False)


def prompt_and_answer(prompt: str, answer: str) -> Record:
    """The record of one prompt and its answer.

    >>> prompt_and_answer("Abstract: ", "We show.")
    Record(text='Abstract: We show.', answers=((10, 18),))
    """
    text = prompt + answer
    return Record(text, ((len(prompt), len(text)),))


class RecordMaker:
    """Makes records of prompts and answers, in which special tokens that people typed are text.

    Args:
        tokenizer: its chat template renders messages and the "chat" style.
        style: see `utils.data.prompts.format_prompt`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: str = "plain") -> None:
        self.style, self._tokenizer, self._tokens = style, tokenizer, SpecialTokens(tokenizer)

    def instructed(self, instruction: str, answer: str) -> Record:
        """An instruction and its answer. Raises `ChatTemplateError` or `StandInLost`."""
        asked = instruction if self.style == AS_IS else self._tokens.hidden(instruction)
        return self.answered(format_prompt(asked, self.style, self._tokenizer), answer)

    def answered(self, prompt: str, answer: str) -> Record:
        """A prompt whose special tokens count, and an answer of a person."""
        return self._record(prompt + self._tokens.hidden_answer(answer), [len(prompt), None])

    def completed(self, prompt: str, completion: str) -> Record:
        """A rendered prompt and its completion, in which only start and end tokens are text, unless they end it."""
        return self._record(prompt + self._tokens.hidden_answer(completion, self._tokens.ends), [len(prompt), None])

    def conversation(self, messages: Sequence[Message], learned_from: int = 0, tools: Tools | None = None) -> Record:
        """The rendered conversation up to its last answer, with every answer marked. What follows has no loss.

        Args:
            messages: the turns.
            learned_from: index of the first turn that may be an answer. Assistant turns before it are not learned.
            tools: the tools that the prompt lists.

        Raises:
            ChatTemplateError, AnswerNotFound, StandInLost, ToolsLeftOut: see there.
        """
        render = partial(render_chat, tokenizer=self._tokenizer)
        turns = [{**in_all_texts(turn, self._tokens.hidden), ROLE: turn[ROLE]} for turn in messages]
        listed = in_all_texts(tools, self._tokens.hidden)
        require_written(turns, listed, render)
        hidden, answers = find_answers(turns, partial(render, tools=listed), self._tokens, learned_from)
        return self._record(hidden, [position for answer in answers for position in answer])

    def _record(self, hidden: str, positions: Sequence[int | None]) -> Record:
        """The record of a text with stand-ins; None is the text's end."""
        ends = [len(hidden) if position is None else position for position in positions]
        (text, typed), moved = self._tokens.shown(hidden, ends)
        return Record(text, tuple(zip(moved[::2], moved[1::2], strict=True)), typed=typed)
