"""Items are judged before they are collated, and a collator's error names the item and nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dptune import InvalidArgument
from dptune.integrations.collating import collated_items, require_even

EVEN = {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [3], "choices": [1, 2, 3]}


def test_items_of_equal_lengths_pass_in_every_make_and_one_token_more_does_not() -> None:
    arrays = {name: np.array(values) for name, values in EVEN.items()}
    tensors = {name: torch.tensor(values) for name, values in EVEN.items()}
    require_even(0, [EVEN, arrays, tensors, [EVEN, EVEN], {"x": [1]}, ([1], [2, 3]), {"input_ids": 3}])
    for kind in (list, np.array, torch.tensor):
        with pytest.raises(InvalidArgument, match="has 2 values in attention_mask for 3 tokens"):
            require_even(0, [EVEN | {"input_ids": kind([1, 2, 3])}])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_an_uneven_item_is_named(kind: Any) -> None:
    uneven = {"input_ids": kind([1, 2]), "attention_mask": kind([1])}
    for item in (uneven, [EVEN, uneven]):
        with pytest.raises(InvalidArgument, match=r"^train_dataset='item 9 .*has 1 values in attention_mask for 2 tok"):
            require_even(7, [EVEN, item])
    with pytest.raises(InvalidArgument, match="has 1 values in labels for 2 tokens"):
        require_even(0, [EVEN], ("labels",))


def test_an_item_without_tokens_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"^train_dataset='item 2 \(counted from 1\)': has no token; drop the"):
        require_even(0, [EVEN, {"input_ids": [], "attention_mask": []}])


def test_a_collators_error_names_the_item_and_quotes_nothing() -> None:
    def collate(items: list[Any]) -> dict[str, Any]:
        return {"x": torch.tensor([int(item) for item in items])}

    assert collated_items(collate, 0, [1, 2])["x"].tolist() == [1, 2]
    with pytest.raises(InvalidArgument, match=r"^train_dataset='item 6 .*cannot be collated \(ValueError\)") as error:
        collated_items(collate, 4, [1, "secret"])
    assert "secret" not in str(error.value)
    assert error.value.__context__ is None
    with pytest.raises(InvalidArgument, match=r"^data_collator: fails on items 1 to 2 together \(ValueError\)"):
        collated_items(lambda items: {"x": torch.tensor(items)}, 0, [[1], [1, 2]])


def test_too_little_memory_is_not_the_items_fault() -> None:
    def full(_: list[Any]) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        collated_items(full, 0, [1])
