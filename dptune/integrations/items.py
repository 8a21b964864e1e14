"""Whether items that a collator puts together stay apart in the model: tried on a few before training begins."""

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
    """Compare the engine's gradients of some items together with autograd's of each by itself.

    Args:
        model: what is trained.
        losses: inputs of a micro-batch -> losses [B].
        collate: items -> inputs, padded as they are in training.
        examples: the training set; of its first items the shortest and the longest are taken. Where the collator makes
            several rows of an item, rows are compared as it pads them.

    Raises:
        InvalidArgument: they differ: a rule is wrong, or items reach each other, or each other's padding.
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
    """A few, the shortest and the longest among them, each once."""
    lengths = [_length(item) for item in items]
    chosen = {*range(len(items))[:_AT_LEAST], lengths.index(min(lengths)), lengths.index(max(lengths))}
    return [items[index] for index in sorted(chosen)]


def _length(item: Any) -> int:
    """Of its token ids, where it has them."""
    ids = item.get("input_ids", ()) if isinstance(item, Mapping) else ()
    return len(ids)
