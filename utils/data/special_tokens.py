"""Keeps special tokens that a person typed apart from those that a prompt or a chat template writes.

`</s>` in a person's text (HTML's strike-through) is text. As the end token it would end an answer in its middle, and
`<|im_start|>` would begin a turn that nobody took. A tokenizer cannot tell the two apart once they stand in one text.
So typed ones are replaced by stand-ins before a text is put together, and are found by them afterwards.

Texts without typed special tokens are tokenised as ever. For the others, a copy of the tokenizer treats its special
tokens as text, and finds the written ones by stand-ins. The whole text is tokenised at once in both cases.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = tuple[tuple[int, int], ...]  # (start, end) in characters, end excluded, ascending
Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and (start, end) of each in characters


class StandInLost(Exception):
    """A chat template cut or changed a stand-in for a special token that the text spells."""


class MarkedText(NamedTuple):
    """A text, and where people typed something that spells a special token."""

    text: str
    typed: Spans = ()


class SpecialTokens:
    """The special tokens of one tokenizer, and stand-ins for those that people typed.

    Args:
        tokenizer: the model's. A slow one gives no offsets: its texts can be marked but not encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        added = backend.get_added_tokens_decoder() if backend is not None else {}
        self._ids = {token.content: number for number, token in added.items() if token.special}
        self._added = {token.content: token for token in added.values() if token.special}
        self._names = sorted(self._added or tokenizer.all_special_tokens, key=len, reverse=True)
        # The longest match counts, as for tokenizers. A pattern that never matches stands for no names.
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        # Private-use characters and digits, which templates and normalizers leave alone. Nobody can guess the number.
        self._sign = f"\ue000{secrets.randbelow(10**15):015}"
        self._stand_in = re.compile(rf"{self._sign}x(\d+)\ue001")

    @property
    def eos_token(self) -> str | None:
        """The end token."""
        name = self._tokenizer.eos_token
        return str(name) if name else None

    @property
    def ends(self) -> tuple[str, ...]:
        """The start and the end token."""
        return tuple(name for name in (self._tokenizer.bos_token, self._tokenizer.eos_token) if name)

    def hidden(self, text: str, only: Collection[str] | None = None) -> str:
        """The text of a person with stand-ins for special tokens, or for those in `only`."""

        def replaced(found: re.Match[str]) -> str:
            name = found[0]
            return name if only is not None and name not in only else self._of(self._names.index(name))

        return self._pattern.sub(replaced, text)

    def hidden_answer(self, text: str, only: Collection[str] | None = None) -> str:
        """The same for an answer, but end tokens at its very end stay: they mark the end, and are no text."""
        body = text.rstrip()
        while (end := self._tokenizer.eos_token) and body.endswith(end):
            body = body.removesuffix(end).rstrip()
        kept = text[len(body) :]
        return self.hidden(text, only) if not kept.strip() else self.hidden(body, only) + kept

    def shown(self, hidden: str, positions: Sequence[int] = ()) -> tuple[MarkedText, list[int]]:
        """The text behind the stand-ins, and where `positions` of `hidden` are in it.

        Raises:
            StandInLost: see there.
        """
        if self._sign not in hidden:
            return MarkedText(hidden), list(positions)
        parts, typed, moved, last, size = [], [], list(positions), 0, 0
        for found in self._stand_in.finditer(hidden):
            parts += [hidden[last : found.start()], self._names[int(found[1])]]
            start = size + len(parts[-2])
            size, last = start + len(parts[-1]), found.end()
            typed.append((start, size))
            gone = len(found[0]) - len(parts[-1])
            moved = [now - gone if was >= found.end() else now for was, now in zip(positions, moved, strict=True)]
        text = "".join([*parts, hidden[last:]])
        if self._sign in text:
            raise StandInLost("the chat template cuts or changes a special token that the text spells")
        return MarkedText(text, tuple(typed)), moved

    def last_end(self, text: str) -> int:
        """Where the last special token of `text` ends; 0 if it has none."""
        return max((found.end() for found in self._pattern.finditer(text)), default=0)

    def encoded(self, texts: Sequence[MarkedText]) -> Iterator[Tokens]:
        """The tokens of each text in which only the special tokens count that nobody typed.

        The tokenizer's own start and end tokens are added. A text that brings the start token gets no second one.
        """
        plain = self._plain([one.text for one in texts if not one.typed])
        for one in texts:
            ids, offsets = self._around_typed(one) if one.typed else next(plain)
            start = self._tokenizer.bos_token_id
            if start is not None and ids[:2] == [start, start]:
                ids, offsets = ids[1:], offsets[1:]
            yield ids, offsets

    def _plain(self, texts: list[str]) -> Iterator[Tokens]:
        if not texts:
            return
        encoded = self._tokenizer(
            texts,
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            truncation=False,
            split_special_tokens=False,
            verbose=False,  # no warning about texts beyond the model's context, which are cut later
        )
        yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    def _around_typed(self, one: MarkedText) -> Tokens:
        """The tokens of a text with typed special tokens, from the copy that treats all of them as text."""
        copy, written = self._copy
        parts, last, sources = [], 0, []
        for found in self._pattern.finditer(one.text):
            if any(start < found.end() and found.start() < end for start, end in one.typed):
                continue
            stand_in = self._of(self._names.index(found[0]))
            parts += [one.text[last : found.start()], stand_in]
            sources += [*range(last, found.start()), *[found.start()] * len(stand_in)]
            last = found.end()
        sources += range(last, len(one.text) + 1)
        encoding = copy.encode("".join([*parts, one.text[last:]]))
        offsets = [_moved(start, end, sources) for start, end in encoding.offsets]
        return [written.get(number, number) for number in encoding.ids], offsets

    @cached_property
    def _copy(self) -> tuple[Any, dict[int, int]]:
        """A tokenizer with special tokens as text, and {its id of a stand-in: the id that it stands for}."""
        from transformers import AddedToken  # slow to import, so only here

        backend = self._tokenizer.backend_tokenizer
        copy = type(backend).from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        numbers: dict[int, int] = {}
        for index, name in enumerate(self._names):
            of = self._added[name]
            how = {"single_word": of.single_word, "lstrip": of.lstrip, "rstrip": of.rstrip, "normalized": of.normalized}
            copy.add_tokens([AddedToken(self._of(index), special=False, **how)])
            numbers[int(copy.token_to_id(self._of(index)) or 0)] = self._ids[name]
        return copy, numbers

    def _of(self, index: int) -> str:
        return f"{self._sign}x{index}\ue001"


def _moved(start: int, end: int, sources: Sequence[int]) -> tuple[int, int]:
    """(start, end) in the text that was encoded -> in the text that it stands for; `sources` by character."""
    return sources[start], sources[end]
