"""Items of a training set that a collator cannot put together, told by their number.

An error's own text may quote an item, so a message tells only the kind of error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from dptune._validate import HIDDEN, InvalidArgument, refuse
from dptune.integrations.items import COLLATOR_ERRORS, TOLD, called

PER_TOKEN = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")  # beside input_ids
Collate = Callable[[list[Any]], Mapping[str, Any]]


def require_even(first: int, items: list[Any], names: Sequence[str] = PER_TOKEN) -> None:
    """Refuse an item without a token, or with other numbers of values than of tokens.

    Args:
        first: number of the first item, from 0.
        items: items, or lists of rows; those without "input_ids" are taken as they are.
        names: what must have one value per token.

    Raises:
        InvalidArgument: names the item by its number.
    """
    for number, item in enumerate(items, start=first):
        for row in item if isinstance(item, list) else [item]:
            tokens = _length(row, "input_ids")
            if tokens == 0:
                refuse(TOLD, called(number), "has no token; drop the item")
            for name in names:
                if tokens is not None and (found := _length(row, name)) not in (None, tokens):
                    remedy = f"has {found} values in {name} for {tokens} tokens; give one for each token"
                    refuse(TOLD, called(number), remedy)


def _length(row: Any, name: str) -> int | None:
    """Length of a list or array in a row; None without one."""
    value = row.get(name) if isinstance(row, Mapping) else None
    if isinstance(value, np.ndarray | Tensor) and not value.ndim:
        return None
    return len(value) if isinstance(value, list | np.ndarray | Tensor) else None


def collated_items(collate: Collate, first: int, items: list[Any]) -> Mapping[str, Any]:
    """The collated items.

    Raises:
        InvalidArgument: the collator fails; the message names the first item on which it fails alone.
    """
    inputs, kind = _try(collate, items)
    return _refuse_items(collate, first, items, kind) if inputs is None else inputs


def _refuse_items(collate: Collate, first: int, items: list[Any], kind: str) -> NoReturn:
    for number, item in enumerate(items, start=first):
        alone, found = _try(collate, [item])
        if alone is None:
            refuse(TOLD, called(number), f"cannot be collated ({found}); fix the item, or data_collator")
    which = f"items {first + 1} to {first + len(items)}"
    refuse("data_collator", HIDDEN, f"fails on {which} together ({kind}); pad all values of an item to one length")


def _try(collate: Collate, items: list[Any]) -> tuple[Mapping[str, Any] | None, str]:
    """(what the collator makes, "") or (None, the kind of its error)."""
    try:
        return collate(items), ""
    except (InvalidArgument, torch.OutOfMemoryError):
        raise
    except COLLATOR_ERRORS as error:
        return None, type(error).__name__
