"""Keeps special tokens that a person typed apart from those that a prompt or a chat template writes.

`</s>` in a person's text (HTML's strike-through) is text. As the end token it would end an answer in its middle, and
`<|im_start|>` would begin a turn that nobody took. A tokenizer cannot tell the two apart once they stand in one text.
So typed ones are replaced by stand-ins before a text is put together, and are found by them afterwards.

Texts without typed special tokens are tokenised as ever. For the others, a copy of the tokenizer has stand-ins as the
names of its special tokens, and the written ones are replaced by them. The whole text is tokenised at once in both
cases. A check of the tokens follows: each special one stands where its name was written.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from utils.data.renamed_tokens import with_renamed

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Spans = tuple[tuple[int, int], ...]  # (start, end) in characters, end excluded, ascending
Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and (start, end) of each in characters


class StandInLost(Exception):
    """A chat template cut or changed a stand-in for a special token that the text spells."""


class UnwrittenToken(Exception):
    """A special token came out of a text in which nobody wrote it. `number` counts the texts from 1."""

    def __init__(self, number: int) -> None:
        super().__init__(f"text {number} gives a special token that nobody wrote")
        self.number = number


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
        added = backend.get_added_tokens_decoder().values() if backend is not None else ()
        found = {*(token.content for token in added if token.special), *tokenizer.all_special_tokens}
        known = [name for name in found if backend is None or backend.token_to_id(name) is not None]
        self._names = sorted(known, key=lambda name: (-len(name), name))
        self._id_of = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in self._names}
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        # Unknown characters give the unknown token. That is harmless, unless it is an end token too.
        self._guarded = frozenset(self._id_of.values()) - ({tokenizer.unk_token_id} - ends)
        # The longest match counts, as for tokenizers. A pattern that never matches stands for no names.
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")
        # Private-use characters and digits, which templates and normalizers leave alone. Nobody can guess the number.
        self._number = f"{secrets.randbelow(10**15):015}"
        self._sign = f"\ue000{self._number}"
        self._stand_in = re.compile(rf"{self._sign}x(\d+)\ue001")

    @property
    def ids(self) -> frozenset[int]:
        """The numbers of all special tokens, the unknown token among them."""
        return frozenset(self._id_of.values())

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
        if self._number not in hidden:
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
        if self._number in text:  # also where a template escapes what is not ASCII
            raise StandInLost("the chat template cuts or changes a special token that the text spells")
        return MarkedText(text, tuple(typed)), moved

    def last_end(self, text: str) -> int:
        """Where the last special token of `text` ends; 0 if it has none."""
        return max((found.end() for found in self._pattern.finditer(text)), default=0)

    def encoded(self, texts: Sequence[MarkedText]) -> Iterator[Tokens]:
        """The tokens of each text in which only the special tokens count that nobody typed.

        The tokenizer's own start and end tokens are added. A text that brings the start token gets no second one.

        Raises:
            UnwrittenToken: the model of the tokenizer makes a special token of what is none.
        """
        plain = self._plain([one.text for one in texts if not one.typed])
        for number, one in enumerate(texts, start=1):
            found = None if one.typed else next(plain)
            if found is None or not self._all_written(one, *found):
                found = self._as_text(one)
                if not self._all_written(one, *found):
                    raise UnwrittenToken(number)
            ids, offsets = found
            start = self._tokenizer.bos_token_id
            if start is not None and ids[:2] == [start, start]:
                ids, offsets = ids[1:], offsets[1:]
            yield ids, offsets

    def encoded_without_offsets(self, one: MarkedText) -> list[int]:
        """The tokens of a text, from a tokenizer that gives no offsets.

        Raises:
            UnwrittenToken: somebody typed a special token, which such a tokenizer cannot keep apart.
        """
        ids = list(self._tokenizer(one.text)["input_ids"])
        written = len(self._pattern.findall(one.text)) + self.count(self._tokenizer("")["input_ids"])
        if one.typed or self.count(ids) > written:
            raise UnwrittenToken(1)
        return ids

    def count(self, ids: Sequence[int]) -> int:
        """How many tokens are special. The unknown token counts only where it is a start or an end token too."""
        return sum(number in self._guarded for number in ids)

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

    def _as_text(self, one: MarkedText) -> Tokens:
        """The tokens of a text, from the copy in which only stand-ins are special tokens."""
        parts, last, sources = [], 0, []
        for found in self._written(one):
            stand_in = self._of(self._names.index(found[0]))
            parts += [one.text[last : found.start()], stand_in]
            sources += [*range(last, found.start()), *[found.start()] * len(stand_in)]
            last = found.end()
        sources += range(last, len(one.text) + 1)
        encoding = self.text_only.encode("".join([*parts, one.text[last:]]))
        return encoding.ids, [(sources[start], sources[end]) for start, end in encoding.offsets]

    def _written(self, one: MarkedText) -> Iterator[re.Match[str]]:
        """The special tokens of a text that nobody typed."""
        for found in self._pattern.finditer(one.text):
            if not any(start < found.end() and found.start() < end for start, end in one.typed):
                yield found

    def _all_written(self, one: MarkedText, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> bool:
        """Whether each special token stands where its name was written, or comes from the tokenizer itself."""
        places = [(number, *place) for number, place in zip(ids, offsets, strict=True) if number in self._guarded]
        if not any(end for _, _, end in places):  # those that the tokenizer adds have the place (0, 0)
            return True
        written = {found.start(): found for found in self._written(one)}
        return all(not end or self._spells(number, written, start, end) for number, start, end in places)

    def _spells(self, number: int, written: Mapping[int, re.Match[str]], start: int, end: int) -> bool:
        """Whether the name of a token was written between two places, maybe with white space around it."""
        inside = (written[place] for place in range(start, end) if place in written)
        return any(found.end() <= end and self._id_of[found[0]] == number for found in inside)

    @cached_property
    def text_only(self) -> Tokenizer:
        """A copy of a fast tokenizer for which the special tokens are text: their names are stand-ins."""
        names = {name: self._of(index) for index, name in enumerate(self._names)}
        return with_renamed(self._tokenizer.backend_tokenizer, names)

    def _of(self, index: int) -> str:
        return f"{self._sign}x{index}\ue001"
