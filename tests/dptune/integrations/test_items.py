"""The check on a few items: it sees what a collator does, and which items it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dptune import InvalidArgument
from dptune.integrations.items import check_on_items
from dptune.integrations.losses import DefaultLosses
from tests.dptune.integrations.runs import Collator, data, lora_llama


def check(collate: Any = None, examples: Any = None, losses: Any = None) -> list[int]:
    """The number of losses of each forward pass of the check."""
    model, counts = lora_llama(), []

    def own(inputs: Mapping[str, Any]) -> Tensor:
        found = (losses or DefaultLosses())(model, inputs)
        counts.append(len(found))
        return found

    check_on_items(model, own, collate or Collator(), data() if examples is None else examples)
    return counts


def test_rows_that_are_padded_on_the_right_pass() -> None:
    assert {5, 1} <= set(check()), "together, and each one alone"


def test_losses_that_couple_items_are_refused() -> None:
    model = lora_llama()

    def coupled(inputs: Mapping[str, Any]) -> Tensor:
        losses = DefaultLosses()(model, inputs)
        return losses * losses.detach().mean()

    with pytest.raises(InvalidArgument, match="differ from autograd's"):
        check_on_items(model, coupled, Collator(), data())


def test_a_collator_that_mixes_items_is_refused() -> None:
    def shifted(items: list[Any]) -> dict[str, Tensor]:
        return {name: values.roll(1, 0) for name, values in Collator()(items).items()}

    with pytest.raises(InvalidArgument, match="neighbours"):
        check(shifted)


def test_a_collator_that_makes_several_rows_per_item_is_compared_row_by_row() -> None:
    assert set(check(lambda items: Collator()([item for item in items for _ in range(2)]))) == {10, 1}


def test_the_shortest_and_the_longest_of_the_first_items_are_taken() -> None:
    looked_at: list[list[int]] = []

    def note(items: list[Any]) -> dict[str, Tensor]:
        looked_at.append([len(item["input_ids"]) for item in items])
        return Collator()(items)

    lengths = [9] * 10 + [3] + [9] * 10 + [25] + [9] * 60 + [40]
    items = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    check(note, items)
    assert looked_at[0] == [9, 9, 9, 3, 25], "the last one is beyond those that are looked at"


def test_fewer_items_than_it_takes_are_enough() -> None:
    assert set(check(examples=data(2))) == {2, 1}


def test_dropout_is_off_and_the_mode_is_as_before() -> None:
    model = lora_llama(dropout=0.5).train()
    check_on_items(model, lambda inputs: DefaultLosses()(model, inputs), Collator(), data(4))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
