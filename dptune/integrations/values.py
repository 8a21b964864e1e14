"""Looks at every item of a training set before the first step: token ids, labels, and whether there is any to learn.

An item that the model cannot read would end the run at the step that draws it. By then budget is spent, and the failure
reveals that the item was drawn. A message shows at most one number of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune.integrations.draws import fetch
from dptune.losses import IGNORE
from dptune.per_example.quantized import require_separate_rounding

_AT_ONCE = 256
_TOLD = "train_dataset"
Collate = Callable[[list[Any]], Mapping[str, Any]]


def require_known_values(model: nn.Module, examples: Any, collate: Collate, *, labels: bool = True) -> None:
    """Refuse a training set with an item that the model cannot read, or with nothing to learn.

    Args:
        model: a transformers model, possibly inside PEFT.
        examples: the training set; if it has `all_rows`, those are looked at, because an item holds only some of them.
        collate: items -> inputs, as in training.
        labels: whether "labels" are those of the default losses: classes for [B], tokens for [B, T].

    Raises:
        InvalidArgument: names the item by its number, and the value.
    """
    require_separate_rounding(model)  # first, because the model is run below
    rows = getattr(examples, "all_rows", examples)
    learned = has_labels = False
    classes: int | None = None
    with torch.random.fork_rng(devices=[]):  # some collators draw random numbers
        for first, items in _chunks(rows):
            inputs = collate(items)
            _require_below(_embeddings(model), inputs.get("input_ids"), "token", first, items, collate, "input_ids")
            given = inputs.get("labels") if labels else None
            if not isinstance(given, Tensor) or given.is_floating_point():
                continue
            classes = classes or _outputs(model, collate(items[:1]), given)
            what = "label" if given.ndim == 1 else "label of a token"
            _require_below(classes, given, what, first, items, collate, "labels")
            has_labels = True
            learned = learned or bool((given if given.ndim == 1 else given[:, 1:]).ne(IGNORE).any())
    if has_labels and not learned:
        refuse(_TOLD, f"{len(rows)} items", f"none has a label to learn: all are {IGNORE}; give items with labels")


def _chunks(rows: Any) -> Iterator[tuple[int, list[Any]]]:
    """(number of the first item, items) of one part of the data after another."""
    for first in range(0, len(rows), _AT_ONCE):
        yield first, fetch(rows, range(first, min(first + _AT_ONCE, len(rows))))


def _require_below(
    limit: int | None, values: Any, what: str, first: int, items: list[Any], collate: Collate, name: str
) -> None:
    """Refuse values that are not in [0, limit) nor, as labels, IGNORE."""
    if limit is None or not isinstance(values, Tensor) or (bad := _beyond(values, limit, name)) is None:
        return
    alone = (_beyond(collate([item])[name], limit, name) for item in items)
    found = next(((number, value) for number, value in enumerate(alone, start=first + 1) if value is not None), None)
    where, value = ("padding", bad) if found is None else (f"item {found[0]} (counted from 1)", found[1])
    if name == "input_ids":
        refuse(_TOLD, where, f"has {what} {value}, but the model has {limit} embeddings; use the model's own tokenizer")
    remedy = f"drop the item, or give {IGNORE} for no label"
    refuse(_TOLD, where, f"has {what} {value}, but the model has {limit} classes, from 0 to {limit - 1}; {remedy}")


def _beyond(values: Tensor, limit: int, name: str) -> int | None:
    """The first value that is out of range."""
    bad = (values < 0) | (values >= limit)
    if name == "labels":
        bad &= values != IGNORE
    return int(values[bad][0]) if bool(bad.any()) else None


def _embeddings(model: Any) -> int | None:
    """Number of token embeddings; None if the model has none."""
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):
        return None


@torch.no_grad()
def _outputs(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> int | None:
    """Number of classes or tokens that the model tells apart; None if its output has no logits of that shape."""
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in inputs.items() if name != "labels"}
    was_training = model.training
    model.eval()
    try:
        logits = getattr(model(**given), "logits", None)
    finally:
        model.train(was_training)
    return int(logits.shape[-1]) if isinstance(logits, Tensor) and logits.ndim == labels.ndim + 1 else None
