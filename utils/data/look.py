"""Looks at training rows as a run would see them: tokens of a few, and statistics of all.

It uses the code that makes the training rows, with no limit to their length, and then applies the block size. So it
can tell how much each row loses. Nothing here is private: what it returns is the data.

Shapes: N rows, T tokens of one row.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dptune._validate import refuse
from dptune.units.columns import names_users
from utils.data.encoding import Encoded, Encoder
from utils.data.make_rows import RowSettings
from utils.data.sources import RowSource, numbered
from utils.files.cells import Place
from utils.files.tables import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAWN = 3  # rows that are shown unless others are chosen
BETWEEN = "·"  # tokens; chat templates have many a vertical bar
UNLIMITED = 2**31 - 1  # a block size that cuts nothing
_LEARNED, _OFF = "\033[32m", "\033[0m"  # green
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class LookedRow:
    """One row.

    Attributes:
        number: its number in the training data, from 1.
        ids: all its tokens, int32 [T].
        learned: for each token, whether its loss counts, bool [T].
        author: whose row it is, if there is a column of authors and the row has a value.
        path, row: its file, and its number there, from 1.
    """

    number: int
    ids: np.ndarray
    learned: np.ndarray
    author: str | None
    path: str = ""
    row: int = 0


@dataclass
class Look:
    """What was seen.

    Attributes:
        shown: the chosen or drawn rows, ascending.
        lengths: tokens of every row before any is cut [N].
        without_answer: rows without a token to learn within the block size.
        rows_of: rows of each author.
        alone: rows without an author, each a unit by itself.
        prompt_style: the style that sampling must use.
        files: (name, number of rows before it) of each file.
        user_columns: columns whose names say that they hold users.
    """

    shown: list[LookedRow] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    without_answer: int = 0
    rows_of: Counter[str] = field(default_factory=Counter)
    alone: int = 0
    prompt_style: str | None = None
    files: list[tuple[str, int]] = field(default_factory=list)
    user_columns: dict[str, None] = field(default_factory=dict)

    def num_cut(self, block_size: int) -> int:
        """Number of rows that are longer than the block size."""
        return int((np.array(self.lengths) > block_size).sum())

    def _add(self, encoded: Encoded, authors: Sequence[str | None], block_size: int) -> None:
        """Count some rows."""
        self.lengths.extend(encoded.sizes.tolist())
        self.without_answer += sum(not learned[:block_size].any() for _, learned in _rows(encoded))
        self.rows_of.update(author for author in authors if author is not None)
        self.alone += sum(author is None for author in authors)

    def _places(self, rows: Iterator[tuple[Place, Row]]) -> Iterator[tuple[Place, Row]]:
        """The same rows; notes where each file begins, and which columns name users."""
        for number, (place, row) in enumerate(rows):
            if place.row == 1:
                self.files.append((place.path, number))
            self.user_columns |= dict.fromkeys(name for name in row if names_users(name))
            yield place, row


def look_at_rows(
    settings: RowSettings,
    source: RowSource,
    *,
    chosen: Collection[int] = (),
    first: int | None = None,
    generator: random.Random | None = None,
) -> Look:
    """Read the rows once.

    Args:
        settings: how rows become examples.
        source: where they come from.
        chosen: numbers of the rows to show, from 1; none to draw `DRAWN` of them at random.
        first: read only so many rows; None reads all.
        generator: draws the rows.

    Raises:
        InvalidArgument: a row is no example, or a chosen number is beyond the last row.
    """
    look, draw = Look(), _Choice(chosen, generator or random.Random())
    rows = look._places(islice(numbered(source, settings.unit.column), first))
    make, found = settings.encoded(rows, source, Encoder(settings.tokenizer, UNLIMITED))
    for encoded, authors in found:
        for (ids, learned), author in zip(_rows(encoded), authors, strict=True):
            draw.offer(ids, learned, author)
        look._add(encoded, authors, settings.block_size)
    if (most := max(chosen, default=0)) > len(look.lengths):
        refuse("--rows", most, f"there are {len(look.lengths):,} rows; give numbers from 1 to that")
    look.prompt_style = None if make is None else make.prompt_style
    look.shown = [_placed(row, look.files) for row in draw.rows]
    return look


class _Choice:
    """Keeps the chosen rows of a stream, or some at random, each set of them equally likely (algorithm R)."""

    def __init__(self, chosen: Collection[int], generator: random.Random) -> None:
        self._chosen, self._generator, self._seen = frozenset(chosen), generator, 0
        self._kept: list[LookedRow] = []

    @property
    def rows(self) -> list[LookedRow]:
        """The kept rows in order."""
        return sorted(self._kept, key=lambda row: row.number)

    def offer(self, ids: np.ndarray, learned: np.ndarray, author: str | None) -> None:
        """Keep the next row or not."""
        self._seen += 1
        if self._chosen:
            if self._seen not in self._chosen:
                return
            place = len(self._kept)
        else:
            place = len(self._kept) if self._seen <= DRAWN else self._generator.randrange(self._seen)
            if place >= DRAWN:
                return
        self._kept[place : place + 1] = [LookedRow(self._seen, ids.copy(), learned.copy(), author)]


def shown_row(row: LookedRow, tokenizer: PreTrainedTokenizerBase, block_size: int, *, colour: bool) -> list[str]:
    """Lines that show a row: its place, and its tokens with `·` between them, as a run would see them.

    Learned tokens are green, or else in brackets. Line breaks and control characters are written as escapes.

    Args:
        row: the row.
        tokenizer: the model's; fast.
        block_size: the row's tokens beyond it are cut.
        colour: whether the terminal understands colours.
    """
    kept = slice(0, block_size)
    learned, size = row.learned[kept], len(row.ids)
    head = [f"row {row.number:,}", f"({row.path}, row {row.row:,})", f"{size:,} tokens, {int(learned.sum()):,} learned"]
    cut = [f"cut: {size - block_size:,} tokens are beyond --block_size {block_size:,}"] if size > block_size else []
    lines = ["  ".join([*head, *cut])]
    if row.author is not None:
        lines.append(f"author {printable(row.author)}")
    return [*lines, _marked(pieces(row.ids[kept].tolist(), tokenizer), learned.tolist(), colour=colour)]


def statistics(look: Look, block_size: int, *, sampled: bool = False, authors: bool = False) -> list[str]:
    """Lines about all rows that were read.

    Args:
        look: what was seen; at least one row.
        block_size: rows longer than that are cut.
        sampled: whether only the first rows were read.
        authors: whether there is a column of authors.
    """
    lengths, cut = np.array(look.lengths), look.num_cut(block_size)
    total = len(lengths)
    levels = np.percentile(lengths, _PERCENTILES, method="inverted_cdf").astype(int).tolist()
    told = ", ".join(f"{level}% up to {value:,}" for level, value in zip(_PERCENTILES, levels, strict=True))
    lines = [
        f"rows                   {total:,}{' (only the first were read: --first_rows)' if sampled else ''}",
        f"prompt style           {look.prompt_style}",
        f"cut by --block_size    {_share(cut, total)}, at {block_size:,} tokens",
        f"nothing to learn       {_share(look.without_answer, total)}: no answer, or --block_size cuts it off",
        f"tokens before the cut  {told}, the longest {int(lengths.max()):,}",
    ]
    if look.user_columns and not authors:
        named = [" ".join(name.split()) for name in look.user_columns]
        told = f"--privacy_unit {named[0]} to protect people, or --ignore_users to protect rows"
        lines.append(f"names people in        {', '.join(named)}: a private run needs {told}")
    if authors:
        counts = np.array([*look.rows_of.values(), *([1] * look.alone)])
        lines.append(f"authors                {len(counts):,}; {look.alone:,} of them are rows without a value")
        lines.append(f"rows per author        median {np.median(counts):g}, largest {counts.max():,}")
    return lines


def pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token. A token that ends within a character has none: the one that completes it has it all."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, number) or "" for number in ids]


def printable(text: str) -> str:
    """The text on one line, in which no character moves the cursor or changes the terminal.

    >>> printable("One\\n\\x1b[2Jtwo")
    'One\\\\n\\\\x1b[2Jtwo'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _marked(texts: Sequence[str], learned: Sequence[bool], *, colour: bool) -> str:
    """The tokens on one line, with every run of learned ones marked."""
    begin, end = (_LEARNED, _OFF) if colour else ("[", "]")
    runs: list[tuple[bool, list[str]]] = []
    for text, is_learned in zip(texts, learned, strict=True):
        if not runs or runs[-1][0] != is_learned:
            runs.append((is_learned, []))
        runs[-1][1].append(printable(text))
    joined = ((is_learned, BETWEEN.join(run)) for is_learned, run in runs)
    return BETWEEN.join(f"{begin}{run}{end}" if is_learned else run for is_learned, run in joined)


def _rows(encoded: Encoded) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, whether each is learned) of each row."""
    stop = 0
    for size in encoded.sizes.tolist():
        start, stop = stop, stop + size
        yield encoded.ids[start:stop], encoded.is_answer[start:stop]


def _placed(row: LookedRow, files: Sequence[tuple[str, int]]) -> LookedRow:
    """The row with its file, and its number there."""
    path, before = next((path, before) for path, before in reversed(files) if before < row.number)
    return LookedRow(row.number, row.ids, row.learned, row.author, path, row.number - before)


def _share(count: int, total: int) -> str:
    return f"{count:,} rows ({100 * count / total:.3g}%)"
