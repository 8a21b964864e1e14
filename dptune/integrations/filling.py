"""Micro-batches of fixed shapes from the items of a Trainer's data set, whichever collator it has.

A collator pads a micro-batch to its longest item, so its shape would follow the draw (see `dptune.shapes`). Therefore
each micro-batch is collated together with a random item of exactly its width, whose rows are dropped afterwards. Random
items also fill up a micro-batch with too few items. The step counts them as zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dptune._validate import refuse
from dptune.integrations.draws import Collator, Examples, MicroBatch
from dptune.integrations.items import Make, full_lists, length_of, random_item
from dptune.integrations.vocabulary import Vocabulary
from dptune.per_example import RandomRow
from dptune.shapes import Shape, Shapes, deal_in_shapes

_FILLER = 0  # the number of the random row, which is the same in all micro-batches of a width


@dataclass(frozen=True)
class FilledBatches:
    """Cuts items into micro-batches whose shapes follow from each item's own length and number of rows.

    Attributes:
        collate: items -> inputs of a micro-batch.
        make: what all items are made of.
        vocabulary: the values of random items.
        shapes: the run's shapes.
        most_rows: the largest number of rows per item.
    """

    collate: Collator
    make: Make
    vocabulary: Vocabulary
    shapes: Shapes
    most_rows: int = 1

    def __call__(self, items: Sequence[Any], rows_per_item: np.ndarray) -> list[MicroBatch]:
        """Cut some items.

        Args:
            items: one process's share of a draw.
            rows_per_item: number of rows that the collator makes of each, int64 [items].

        Raises:
            ValueError: an item is longer than the longest shape.
            InvalidArgument: the collator makes another number of rows.
        """
        tokens = np.array([max(1, length_of(item, self.make)) for item in items], dtype=np.int64)
        rounded = np.minimum(2 ** np.ceil(np.log2(rows_per_item)).astype(np.int64), self.most_rows)
        made = []
        for rows in np.unique(rounded):
            own = np.flatnonzero(rounded == rows)
            full = np.array([full_lists(item, self.make, self.shapes.longest, int(rows)) for item in items])
            for shape, (chosen,) in deal_in_shapes(own, tokens, self.shapes, rows_per_item=int(rows), full=full):
                inputs = self._inputs([items[place] for place in chosen], shape, int(rows))
                made.append(MicroBatch(inputs, chosen, shape.items, int(rows)))
        return made

    def empty(self, rows: int, _examples: Examples) -> MicroBatch:
        """See `Cutter`. It is filled up with a random item."""
        shape = Shape(1, int(self.shapes.widths[0]))
        return MicroBatch(self._inputs([], shape, rows), np.array([], dtype=np.int64), 1, rows)

    def _inputs(self, items: list[Any], shape: Shape, rows: int) -> Mapping[str, Any]:
        """The collated items, filled up to the shape. One more random item, the last, fixes the width."""
        row, missing = RandomRow(shape.width, _FILLER), shape.items + 1 - len(items)
        added = [random_item(self.make, row, self.vocabulary, rows=rows) for _ in range(missing)]
        collated, wanted = self.collate([*items, *added]), (shape.items + 1) * rows
        return {name: _without_last(name, value, wanted, rows) for name, value in collated.items()}


def _without_last(name: str, value: Any, wanted: int, rows: int) -> Any:
    if not isinstance(value, Tensor | list | tuple) or (isinstance(value, Tensor) and not value.ndim):
        return value
    if len(value) != wanted:
        remedy = f"where {wanted} are expected: say in rows_per_unit how many rows the collator makes per item"
        refuse("data_collator", name, f"has {len(value)} rows, {remedy}")
    return value[: wanted - rows]
