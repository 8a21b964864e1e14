"""Checks on a few items, before training begins, that items of one micro-batch do not affect each other's gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dptune.integrations.draws import fetch
from dptune.per_example import require_exact_gradients

_LOOKED_AT, _AT_LEAST = 64, 3


def check_on_items(
    model: nn.Module,
    losses: Callable[[Mapping[str, Any]], Tensor],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    examples: Any,
) -> None:
    """Compare the engine's gradients of some items in one micro-batch with autograd's of each item alone.

    Args:
        model: the model that is trained.
        losses: inputs of a micro-batch -> losses [B].
        collate: items -> inputs, padded as in training.
        examples: the training set; a few of its first items are used, with the shortest and the longest. If the
            collator makes several rows per item, rows are compared as it pads them.

    Raises:
        InvalidArgument: they differ, because a rule is wrong or an item affects others by its tokens or its padding.
    """
    items = _of_all_lengths(fetch(examples, range(min(_LOOKED_AT, len(examples)))))
    together = collate(items)
    names = sorted(together)

    def of_parts(*parts: Any) -> Tensor:
        return losses(dict(zip(names, parts, strict=True)))

    def alone(index: int) -> list[Any]:
        inputs = collate([items[index]])
        return [inputs[name] for name in names]

    parts = [together[name] for name in names]
    one_row_each = len(parts[0]) == len(items)
    require_exact_gradients(model, of_parts, *parts, alone=alone if one_row_each else None)


def _of_all_lengths(items: list[Any]) -> list[Any]:
    """A few of the items, each once, including the shortest and the longest."""
    lengths = [_length(item) for item in items]
    chosen = {*range(len(items))[:_AT_LEAST], lengths.index(min(lengths)), lengths.index(max(lengths))}
    return [items[index] for index in sorted(chosen)]


def _length(item: Any) -> int:
    """Number of token ids; 0 if the item has none."""
    ids = item.get("input_ids", ()) if isinstance(item, Mapping) else ()
    return len(ids)
