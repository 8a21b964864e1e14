"""The fixed shapes of micro-batches, so that a row's rounded gradient does not depend on who else was drawn.

The order in which a kernel adds numbers depends on the shape of its inputs. So the rounding of a row's gradient depends
on the shape of its micro-batch. In bfloat16 on a CPU the gradient changed by up to 3.7% between batches of 1, 2, 4 and
8 rows. If shapes depended on the draw, one row more would change what the other rows add. The sensitivity does not
cover that. Here the shape follows from the row's own length alone: a width just above it, and a fixed number of rows
for each width. Micro-batches are filled up with rows that have no label and add exactly nothing.

No torch in this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dptune._validate import require_count, require_positive
from dptune.pass_overhead import pass_overhead

_NARROWEST = 8  # tokens
_EVEN = 2  # widths are even: with odd ones, float32 kernels of a CPU rounded a row by its place in the micro-batch
_WIDE = 64  # tokens; lengths of narrower rows are taken to lie within three doublings, those of wider ones within four
_DOUBLINGS, _WIDE_DOUBLINGS = 3, 4
_PER_DOUBLING = (0.25, 0.5, 1, 2, 4, 8, 16)  # widths per doubling that there may be: a row has 1.5% padding with 16
_NEARLY = 1.05  # of the shortest time: little for the padding that more widths save
_NARROW_PER_DOUBLING = 4  # at most, up to `_WIDE`
_NARROW_ROWS = 4  # a narrow micro-batch has at most so many times the rows of the widest: each needs its own gradient
_CLASS_BITS = 16


@dataclass(frozen=True)
class Shape:
    """The shape of one micro-batch.

    Attributes:
        items: rows, or authors.
        width: tokens per row, padding included.
    """

    items: int
    width: int


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run: they follow from settings alone, never from a draw.

    Models leave out an attention mask if no row of a micro-batch has padding, and then compute with other kernels. With
    `masked`, whether a row meets such a micro-batch follows from its own length: only rows of the longest length have
    no padding, and their micro-batches hold no other rows.

    Attributes:
        longest: maximum tokens per row: a public bound, not the longest row of the data.
        token_budget: maximum padded tokens in one forward pass; an item with more has a micro-batch of its own.
        drawn: expected number of items per step and rank. With more of them, micro-batches have more rows.
        most_rows: maximum rows per micro-batch; by default four times those of the widest.
        masked: whether the model may be given attention masks.
        overhead: the fixed time of one forward and backward pass, as the number of tokens that take as long. With more
            of it, micro-batches have more rows and there are fewer widths. By default that of a CPU.
        views: how often a micro-batch holds each row of an item.

    Raises:
        InvalidArgument: a value below 1, or `drawn` or `overhead` not above 0.
    """

    longest: int
    token_budget: int
    drawn: float = 1.0
    most_rows: int | None = None
    masked: bool = True
    overhead: float = pass_overhead(accelerator=False)
    views: int = 1

    def __post_init__(self) -> None:
        require_count("longest", self.longest)
        require_count("views", self.views)
        require_count("token_budget", self.token_budget)
        require_positive("drawn", self.drawn)
        require_positive("overhead", self.overhead)
        if self.most_rows is not None:
            require_count("most_rows", self.most_rows)

    @cached_property
    def widths(self) -> np.ndarray:
        """All widths, ascending, int64; the last one is `longest`.

        More widths leave less padding and make more micro-batches. There are as many as can be with steps that take
        nearly the shortest time.
        """
        choices = [self._widths(per_doubling) for per_doubling in _PER_DOUBLING]
        times = [self._tokens_of_step(widths) for widths in choices]
        best = max(place for place, time in enumerate(times) if time <= _NEARLY * min(times))
        return np.array(choices[best], dtype=np.int64)

    def _widths(self, per_doubling: float) -> list[int]:
        widths = [min(_NARROWEST, self.longest)]
        while widths[-1] < self.longest:
            own = min(per_doubling, _NARROW_PER_DOUBLING) if widths[-1] < _WIDE else per_doubling
            power = 2 ** (widths[-1].bit_length() - 1)
            step = max(_EVEN, int(power / own)) if own >= 1 else int(widths[-1] * (2 ** (1 / own) - 1))
            widths.append(min(widths[-1] + step, self.longest))
        return widths

    def _tokens_of_step(self, widths: list[int]) -> float:
        """The time of a step in tokens, passes included, if lengths are spread evenly over the last doublings."""
        total = 0.0
        for narrower, width in zip([widths[0] / 2, *widths], widths, strict=False):
            drawn = self._drawn_of(narrower, width)
            tokens = self.views * width
            items = self._items(tokens, drawn, self.views)
            if width > self.longest / 2**_WIDE_DOUBLINGS:
                total += _passes(drawn, items) * (self.overhead + items * tokens)
        return total

    def width_of(self, tokens: np.ndarray) -> np.ndarray:
        """The width of rows with so many tokens, int64.

        Raises:
            ValueError: a row is longer than `longest`.
        """
        if len(tokens) and int(tokens.max()) > self.longest:
            raise ValueError(f"a row of {int(tokens.max())} tokens, where at most {self.longest} are allowed")
        found = np.searchsorted(self.widths, tokens, side="right" if self.masked else "left")
        return np.asarray(self.widths[np.minimum(found, len(self.widths) - 1)], dtype=np.int64)

    def classes_of(self, tokens: np.ndarray, full: np.ndarray | None = None) -> np.ndarray:
        """The class of rows with so many tokens, int64: width x 2^16 + a number below 2^16.

        Rows of two classes never share a micro-batch.

        Args:
            tokens: tokens of each row, int64.
            full: a number below 2^16 for each row that says which of its masks have no padding, int64. By default a
                row has one mask.
        """
        unpadded = np.asarray(tokens == self.longest if full is None else full, dtype=np.int64)
        return np.asarray((self.width_of(tokens) << _CLASS_BITS) + unpadded * self.masked, dtype=np.int64)

    def shape(self, width: int, rows_per_item: int = 1, virtual_tokens: int = 0) -> Shape:
        """The shape of micro-batches of this width.

        Args:
            width: one of `widths`.
            rows_per_item: k, for items of several rows; each view of a row is one.
            virtual_tokens: tokens that the model puts before each row; they count in the budget.
        """
        tokens = rows_per_item * (width + virtual_tokens)
        place = int(np.searchsorted(self.widths, width))
        narrower = float(self.widths[place - 1]) if place else width / 2
        return Shape(self._items(tokens, self._drawn_of(narrower, width), rows_per_item), width)

    def _drawn_of(self, narrower: float, width: float) -> float:
        """The number of items that a step is taken to draw of this width."""
        doublings = _DOUBLINGS if width <= _WIDE else _WIDE_DOUBLINGS
        return self.drawn * min(1.0, math.log2(width / narrower) / doublings)

    def _items(self, tokens: int, drawn: float, rows_per_item: int = 1) -> int:
        """Items per micro-batch, if each has so many tokens and a step draws so many of this width.

        Fewer make more passes. More make more to fill up in the last micro-batch of a step, on average half of one.
        So the least time is at sqrt(2 overhead drawn / tokens), and not above nearly all that a step draws.
        """
        best = math.sqrt(self.overhead * max(0.0, 2 * drawn - 1) / tokens)
        wanted = int(min(best, drawn + 2 * math.sqrt(drawn) + 1))
        most = _NARROW_ROWS * max(1, self.token_budget // self.longest)
        if self.most_rows is not None:
            most = min(most, self.most_rows // rows_per_item)
        return max(1, min(self.token_budget // tokens, wanted, most))

    def sizes(self, rows_per_item: int = 1) -> set[tuple[int, int]]:
        """(rows, padded tokens) of the micro-batches of all shapes.

        Args:
            rows_per_item: the largest number of rows per item, not counting views; items may have fewer.
        """
        rows = [(k * self.shape(width, k).items, width) for k, width in self._kinds(rows_per_item)]
        return {(count, count * width) for count, width in rows}

    def most_passes(self, items: int, *, ranks: int = 1, rows_per_item: int = 1, virtual_tokens: int = 0) -> int:
        """The most micro-batches that a draw of so many items can make on each rank, whatever their lengths.

        Args:
            items: number of items of the draw.
            ranks: number of processes that share the draw.
            rows_per_item: see `sizes`. Rows have one mask each.
            virtual_tokens: see `shape`.
        """
        held = [ranks * self.shape(width, k, virtual_tokens).items for k, width in self._kinds(rows_per_item)]
        if self.masked:  # rows without padding are apart from others of the same width
            held += [ranks * self.shape(self.longest, k, virtual_tokens).items for k in self.row_counts(rows_per_item)]
        # One item makes a micro-batch of each kind. All others are of the kind whose micro-batches hold the fewest.
        return min(items, len(held)) + max(0, items - len(held)) // min(held)

    def row_counts(self, rows_per_item: int) -> set[int]:
        """The numbers of rows, each view counted, to which items of at most so many rows are filled up."""
        powers = range(rows_per_item.bit_length() + 1)
        return {self.views * min(2**power, rows_per_item) for power in powers}

    def _kinds(self, rows_per_item: int) -> list[tuple[int, int]]:
        """(rows per item, width) of all shapes."""
        return [(k, int(width)) for k in sorted(self.row_counts(rows_per_item)) for width in self.widths]


def _passes(drawn: float, rows: int) -> float:
    """Nearly the expected number of micro-batches of `rows` items, if the number of items is Poisson distributed."""
    filled = drawn / rows + (1 - 1 / rows) / 2  # the last one is half full on average
    return max(1 - math.exp(-drawn), min(drawn, filled))


def deal_in_shapes(
    items: np.ndarray,
    tokens: np.ndarray,
    shapes: Shapes,
    *,
    ranks: int = 1,
    rows_per_item: int = 1,
    virtual_tokens: int = 0,
    full: np.ndarray | None = None,
) -> list[tuple[Shape, list[np.ndarray]]]:
    """Cut one draw into micro-batches of fixed shapes, with the same number and shapes on every rank.

    Args:
        items: the drawn items (rows or authors), int64 [n].
        tokens: tokens of each item's longest row, indexed by item.
        shapes: the run's shapes.
        ranks: number of processes that share the draw.
        rows_per_item, virtual_tokens: see `Shapes.shape`.
        full: see `Shapes.classes_of`, indexed by item.

    Returns:
        [(shape, [items of each rank])] from the widest to the narrowest. A rank has at most `shape.items` items, and
        the numbers of two ranks differ by at most one. Fill up the rest. An empty draw gives no micro-batches.
    """
    require_count("ranks", ranks)
    classes = shapes.classes_of(tokens[items], None if full is None else full[items])
    dealt = []
    for one in np.unique(classes)[::-1]:
        shape = shapes.shape(int(one) >> _CLASS_BITS, rows_per_item, virtual_tokens)
        own = items[classes == one]
        for start in range(0, len(own), shape.items * ranks):
            part = own[start : start + shape.items * ranks]
            dealt.append((shape, [part[rank::ranks] for rank in range(ranks)]))
    return dealt
