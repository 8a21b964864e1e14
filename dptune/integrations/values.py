"""Looks at every item of a training set before the first step, for what would end the run at the step that draws it.

By then budget is spent, and the failure reveals that the item was drawn. A message shows the item's number and at most
one number of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from dptune.integrations.collating import PER_TOKEN, Collate, collated_items, require_even
from dptune.integrations.draws import fetch
from dptune.integrations.items import (
    TOLD,
    Make,
    called,
    collated,
    make_of_first,
    random_item,
    require_short_items,
)
from dptune.integrations.losses import is_causal_lm, unplain_part
from dptune.integrations.vocabulary import Vocabulary, context_of, tables_of
from dptune.losses import IGNORE
from dptune.per_example import RandomRow
from dptune.per_example.quantized import require_separate_rounding
from dptune.randomness import fixed_randomness
from dptune.sharding import compute_device

_AT_ONCE = 256
_TRIED = 7  # tokens of the random item that shows the model's classes
_WHAT = {"input_ids": "token", "token_type_ids": "token type", "position_ids": "position"}


def require_known_values(
    model: nn.Module,
    examples: Any,
    collate: Collate,
    *,
    labels: bool = True,
    plain: bool = False,
    longest: int | None = None,
) -> None:
    """Refuse a training set with an item that the model or the collator cannot take, or with nothing to learn.

    Args:
        model: a transformers model, possibly inside PEFT.
        examples: the training set; if it has `all_rows`, those are looked at, because an item holds only some of them.
        collate: items -> inputs, as in training.
        labels: whether "labels" are those of the default losses: classes for [B], tokens for [B, T].
        plain: whether the losses of a causal language model take only rows that are padded on the right.
        longest: the largest number of tokens of an item; None to allow any.

    Raises:
        InvalidArgument: names the item by its number, and the value.
    """
    require_separate_rounding(model)  # first, because the model is run below
    rows = getattr(examples, "all_rows", examples)
    make, tables = make_of_first(rows), tables_of(model)
    if longest is not None:
        require_short_items(rows, make, longest)
    learned = has_labels = False
    classes: int | None = None
    with fixed_randomness(torch.device("cpu")):  # some collators draw random numbers
        for first, items in _chunks(rows):
            require_even(first, items, _beside(model) if labels else PER_TOKEN)
            inputs = collated_items(collate, first, items)
            for name, limit in tables.items():
                _require_below(limit, inputs.get(name), _WHAT[name], first, items, collate, name)
            given = inputs.get("labels") if labels else None
            if not isinstance(given, Tensor) or given.is_floating_point():
                continue
            if plain and given.ndim == 2 and is_causal_lm(model):
                _require_plain(inputs, first, items, collate)
            classes = classes or _outputs(model, _random_inputs(model, make, collate), given)
            what = "label" if given.ndim == 1 else "label of a token"
            _require_below(classes, given, what, first, items, collate, "labels")
            has_labels = True
            learned = learned or bool((given if given.ndim == 1 else given[:, 1:]).ne(IGNORE).any())
    if has_labels and not learned:
        refuse(TOLD, f"{len(rows)} items", f"none has a label to learn: all are {IGNORE}; give items with labels")


def _chunks(rows: Any) -> Iterator[tuple[int, list[Any]]]:
    """(number of the first item, items) of one part of the data after another."""
    for first in range(0, len(rows), _AT_ONCE):
        yield first, fetch(rows, range(first, min(first + _AT_ONCE, len(rows))))


def _beside(model: Any) -> tuple[str, ...]:
    """What has one value per token with the default losses. The labels of a decoder follow no input."""
    apart = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return PER_TOKEN if apart else (*PER_TOKEN, "labels")


def _require_plain(inputs: Mapping[str, Any], first: int, items: list[Any], collate: Collate) -> None:
    """Refuse rows that the default loss of a causal language model does not take."""
    if (found := unplain_part(inputs)) is None:
        return
    for number, item in enumerate(items, start=first):
        if (alone := unplain_part(collate([item]))) is not None:
            refuse(TOLD, called(number), f"{alone[0]}: {alone[1]}")
    refuse(found[0], tuple(inputs[found[0]].shape), found[1])


def _require_below(
    limit: int | None, values: Any, what: str, first: int, items: list[Any], collate: Collate, name: str
) -> None:
    """Refuse values that are not in [0, limit) nor, as labels, IGNORE."""
    if limit is None or not isinstance(values, Tensor) or (bad := _beyond(values, limit, name)) is None:
        return
    alone = (_beyond(collate([item])[name], limit, name) for item in items)
    found = next(((number, value) for number, value in enumerate(alone, start=first) if value is not None), None)
    where, value = ("padding", bad) if found is None else (called(found[0]), found[1])
    if name == "input_ids":
        refuse(TOLD, where, f"has {what} {value}, but the model has {limit} embeddings; use the model's own tokenizer")
    if name != "labels":
        refuse(TOLD, where, f"has {what} {value}, but the model has {limit}, from 0 to {limit - 1}; fix {name}")
    remedy = f"drop the item, or give {IGNORE} for no label"
    refuse(TOLD, where, f"has {what} {value}, but the model has {limit} classes, from 0 to {limit - 1}; {remedy}")


def _beyond(values: Tensor, limit: int, name: str) -> int | None:
    """The first value that is out of range."""
    bad = (values < 0) | (values >= limit)
    if name == "labels":
        bad &= values != IGNORE
    return int(values[bad][0]) if bool(bad.any()) else None


def _random_inputs(model: Any, make: Make, collate: Collate) -> Mapping[str, Any]:
    """A random item, collated: the model is never run on a private one here."""
    row = RandomRow(min(_TRIED, context_of(model) or _TRIED), 0)
    return collated(collate, [random_item(make, row, Vocabulary.of(model))])


@torch.no_grad()
def _outputs(model: Any, inputs: Mapping[str, Any], labels: Tensor) -> int | None:
    """Number of classes or tokens that the model tells apart; None if its output has no logits of that shape."""
    device = compute_device(model)
    given = {name: value.to(device) for name, value in inputs.items() if name != "labels"}
    was_training = model.training
    model.eval()
    try:
        logits = getattr(model(**given), "logits", None)
    finally:
        model.train(was_training)
    return int(logits.shape[-1]) if isinstance(logits, Tensor) and logits.ndim == labels.ndim + 1 else None
