"""What an item of a data set is made of, and random items of the same make, with which a model is checked.

The check uses only the make of the first item: its keys, and whether a value is a list of tokens, a number or an array
of one shape. No private value is used. All items must have the make of the first one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptune._validate import HIDDEN, InvalidArgument, refuse
from dptune.integrations.draws import fetch
from dptune.integrations.vocabulary import Vocabulary, longest_item
from dptune.per_example import RandomRow, require_separate_rows

_READ = 1024  # items at a time
TOLD = "train_dataset"
COLLATOR_ERRORS = (KeyError, IndexError, TypeError, ValueError, RuntimeError)
_TOKENS, _NUMBER, _ARRAY, _OTHER = "tokens", "number", "array", "other"


@dataclass(frozen=True)
class Leaf:
    """One value of an item: `shape` is that of an array, and `whole` says whether it holds integers."""

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    whole: bool = False


@dataclass(frozen=True)
class Named:
    """An item with named values, or a tuple of values."""

    parts: Mapping[Any, Any]
    is_tuple: bool = False


@dataclass(frozen=True)
class Several:
    """An item that is a list of rows."""

    row: Any


Make = Leaf | Named | Several


def make_of(item: Any, name: str = "") -> Make:
    """What an item is made of."""
    if isinstance(item, Mapping):
        return Named({key: make_of(value, str(key)) for key, value in item.items()})
    if isinstance(item, tuple):
        return Named(dict(enumerate(make_of(value) for value in item)), is_tuple=True)
    if isinstance(item, list) and item and isinstance(item[0], Mapping):
        return Several(make_of(item[0]))
    return _leaf(item, name)


def _leaf(value: Any, name: str) -> Leaf:
    if isinstance(value, bool | int | float | np.generic) or getattr(value, "shape", None) == ():
        return Leaf(name, _NUMBER, whole=_is_whole(value))
    if isinstance(value, list) and (not value or isinstance(value[0], int | np.integer)):
        return Leaf(name, _TOKENS)  # quick, for there may be many
    if not isinstance(value, list | np.ndarray | Tensor):
        return Leaf(name, _OTHER)
    try:
        array = value if isinstance(value, Tensor) else np.asarray(value)
    except ValueError:  # rows of different lengths
        return Leaf(name, _OTHER)
    whole = _is_whole(array)
    return Leaf(name, _TOKENS) if whole and array.ndim == 1 else Leaf(name, _ARRAY, tuple(array.shape), whole)


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point()
    return bool(np.issubdtype(np.asarray(value).dtype, np.integer) or np.asarray(value).dtype == np.bool_)


def _leaves(make: Make) -> list[Leaf]:
    if isinstance(make, Leaf):
        return [make]
    parts = make.parts.values() if isinstance(make, Named) else [make.row]
    return [leaf for part in parts for leaf in _leaves(part)]


def has_tokens(make: Make) -> bool:
    """Whether items have lists of tokens, and so a length."""
    return any(leaf.kind == _TOKENS for leaf in _leaves(make))


def make_of_first(examples: Any) -> Make:
    """What the first item of a data set is made of, and so all of them."""
    return make_of(fetch(examples, [0])[0])


def longest_of(model: Any, make: Make, max_length: int | None) -> int:
    """Tokens of the longest item allowed, see `longest_item`; 1 if items have no tokens."""
    return longest_item(model, max_length) if has_tokens(make) else 1


def length_of(item: Any, make: Make) -> int:
    """Tokens of the longest list of tokens in an item; 0 without one."""
    if isinstance(make, Several):
        return max((length_of(row, make.row) for row in item), default=0)
    if isinstance(make, Named):
        return max((length_of(item[key], part) for key, part in make.parts.items()), default=0)
    return len(item) if make.kind == _TOKENS else 0


def full_lists(item: Any, make: Make, longest: int, rows: int = 1) -> int:
    """Which lists of tokens have the longest length in all rows of an item: the sum of 2^i for the i-th list.

    Args:
        item, make: as for `length_of`.
        longest: tokens.
        rows: rows that the collator makes of the item; if it has fewer, rows of padding fill it up.
    """
    if isinstance(make, Several):
        codes = [full_lists(row, make.row, longest) for row in item]
        return functools.reduce(operator.and_, codes) if len(item) == rows else 0
    parts = [(item[key], part) for key, part in make.parts.items()] if isinstance(make, Named) else [(item, make)]
    lists = [len(value) for value, part in parts if isinstance(part, Leaf) and part.kind == _TOKENS]
    return sum(1 << place for place, length in enumerate(lists) if length == longest)


def _fits(item: Any, make: Make) -> bool:
    """Whether an item is made like the first one."""
    if isinstance(make, Several):
        return isinstance(item, list) and all(_fits(row, make.row) for row in item)
    if isinstance(make, Named):
        if not isinstance(item, tuple if make.is_tuple else Mapping) or len(item) != len(make.parts):
            return False
        return all(key in item or make.is_tuple for key in make.parts) and all(
            _fits(item[key], part) for key, part in make.parts.items()
        )
    found = _leaf(item, make.name)
    return (found.kind, found.shape) == (make.kind, make.shape)


def called(number: int) -> str:
    """An item in messages, by its number from 0."""
    return f"item {number + 1} (counted from 1)"


def require_short_items(examples: Any, make: Make, max_length: int) -> None:
    """Read all items once, and refuse one that is longer than `max_length` tokens or made differently from the first
    one.

    Raises:
        InvalidArgument: with the item's number and its length; the item itself is not shown.
    """
    for start in range(0, len(examples), _READ):
        rows = range(start, min(start + _READ, len(examples)))
        for index, item in zip(rows, fetch(examples, rows), strict=True):
            if not _fits(item, make):
                remedy = "has other keys, kinds of values or shapes than the first item; make all items alike"
                refuse(TOLD, called(index), remedy)
            if (length := length_of(item, make)) > max_length:
                remedy = f"has {length} tokens, more than max_length={max_length}: cut it, or raise max_length"
                refuse(TOLD, called(index), remedy)


def random_item(make: Make, row: RandomRow, vocabulary: Vocabulary, *, rows: int = 1) -> Any:
    """An item of that make. Lists of tokens have `row.length` tokens; a list of rows has `rows` rows."""
    if isinstance(make, Several):
        numbers = [row.number + 100 * added for added in range(rows)]
        return [random_item(make.row, row._replace(number=number), vocabulary) for number in numbers]
    if isinstance(make, Named):
        made = {key: random_item(part, row, vocabulary) for key, part in make.parts.items()}
        return tuple(made.values()) if make.is_tuple else made
    if make.kind == _TOKENS:
        return vocabulary.tokens(make.name, row).tolist()
    if make.kind == _NUMBER:
        return vocabulary.number(make.name, row) if make.whole else row.normal(()).item()
    if make.kind == _ARRAY:
        return row.normal(make.shape).gt(0).long() if make.whole else row.normal(make.shape)
    return ""  # a text or another object that the collator leaves out


def check_on_random_items(
    model: nn.Module,
    losses: Callable[[Mapping[str, Any]], Tensor],
    collate: Callable[[list[Any]], Mapping[str, Any]],
    examples: Any,
    *,
    max_length: int | None,
    most_rows: int = 1,
) -> None:
    """Compare the engine's gradients with autograd's on random items, together and each alone, as the collator pads.

    Args:
        model: the model that is trained.
        losses: inputs of a micro-batch -> losses [B].
        collate: items -> inputs, padded as in training.
        examples: the training set.
        max_length: the largest number of tokens of an item; by default the model's context. It must be public.
        most_rows: the largest number of rows of an item, if items are lists of rows.

    Raises:
        InvalidArgument: the gradients differ, because a rule is wrong or an item affects others by its tokens or its
            padding. Or the collator cannot take the random items, or `max_length` is needed.
    """
    make, vocabulary = make_of_first(examples), Vocabulary.of(model)
    if not any(leaf.kind in (_TOKENS, _ARRAY) for leaf in _leaves(make)):
        refuse(TOLD, HIDDEN, "its items have neither token ids nor arrays of numbers; tokenise them first")
    longest = longest_of(model, make, max_length)

    def batch_of(rows: Sequence[RandomRow]) -> list[Any]:
        # All items but the first have two rows, if they may, so that items are filled up.
        counts = [1 if row.number == 0 else min(2, most_rows) for row in rows]
        pairs = zip(rows, counts, strict=True)
        return [collated(collate, [random_item(make, row, vocabulary, rows=count) for row, count in pairs])]

    try:
        require_separate_rows(model, losses, batch_of, longest=longest)
    except torch.OutOfMemoryError:
        refuse("max_length", longest, "two random items of that length do not fit in memory; give a smaller one")


def collated(collate: Callable[[list[Any]], Mapping[str, Any]], items: list[Any]) -> Mapping[str, Any]:
    """Random items as the collator puts them together.

    Raises:
        InvalidArgument: the collator fails on them.
    """
    try:
        return collate(items)
    except (InvalidArgument, torch.OutOfMemoryError):
        raise
    except COLLATOR_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = f"cannot take random items with the keys of the first item ({reason}); items must be numbers alone"
        refuse("data_collator", HIDDEN, remedy)
