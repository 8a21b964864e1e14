"""Every item is looked at before the first step, in the Trainer and in the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from dptune import InvalidArgument
from dptune.integrations.authors import AuthorCollator, AuthorItems
from dptune.integrations.values import require_known_values
from dptune.units.unit import group_by_author
from tests.dptune.integrations.runs import Collator, data, dp_trainer, lora_llama, plain_trainer
from tests.tiny import tiny_llama, tiny_tokenizer

COUNT = 600  # more than are read at a time


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=3))


def stacked(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def rows(**last: Any) -> list[dict[str, Any]]:
    """Labelled rows; the last one is changed."""
    made = [{"input_ids": [2, 3 + n % 5, 4], "attention_mask": [1] * 3, "labels": n % 3} for n in range(COUNT)]
    return [*made[:-1], made[-1] | last]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ({"labels": -1}, r"has label -1, but the model has 3 classes, from 0 to 2; drop the item, or give -100"),
        ({"labels": 3}, "has label 3, but the model has 3 classes"),
        ({"input_ids": [2, 16, 4]}, "has token 16, but the model has 16 embeddings"),
        ({"input_ids": [2, -1, 4]}, "has token -1, "),
    ],
)
def test_one_item_out_of_range_is_named(last: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^train_dataset='item {COUNT} \(counted from 1\)': {told}"):
        require_known_values(classifier(), rows(**last), stacked)


def test_an_item_without_a_label_passes_and_a_data_set_of_them_does_not() -> None:
    require_known_values(classifier(), rows(labels=-100), stacked)
    nothing = [row | {"labels": -100} for row in rows()]
    with pytest.raises(InvalidArgument, match=f"^train_dataset='{COUNT} items': none has a label to learn"):
        require_known_values(classifier(), nothing, stacked)


def test_the_labels_of_a_loss_of_ones_own_are_not_judged() -> None:
    require_known_values(classifier(), rows(labels=-1), stacked, labels=False)
    with pytest.raises(InvalidArgument, match="has token 16"):
        require_known_values(classifier(), rows(input_ids=[2, 16, 4]), stacked, labels=False)


def test_scores_are_left_to_the_loss_and_whole_numbers_and_tokens_are_not() -> None:
    def scored(label: float, **last: Any) -> list[dict[str, Any]]:
        return [row | {"labels": label} for row in rows(**last)]

    require_known_values(classifier(), scored(-1.5), stacked)
    with pytest.raises(InvalidArgument, match=r"item 1 .* has label -1, but the model has 3 classes"):
        require_known_values(classifier(), scored(-1), stacked)
    with pytest.raises(InvalidArgument, match=f"item {COUNT} .* has token 16"):
        require_known_values(classifier(), scored(-1.5, input_ids=[2, 16, 4]), stacked)


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"input_ids": [1, 400], "labels": [-100, 3]}, "has token 400, but the model has 400 embeddings"),
        ({"input_ids": [1, 3], "labels": [-100, 400]}, "has label of a token 400, but the model has 400 classes"),
        ({"input_ids": [1, 3], "labels": [-100, -1]}, "has label of a token -1"),
    ],
)
def test_tokens_and_labels_of_a_language_model(item: dict[str, Any], told: str) -> None:
    require_known_values(lora_llama(), data(), Collator())
    with pytest.raises(InvalidArgument, match=rf"^train_dataset='item 13 \(counted from 1\)': {told}"):
        require_known_values(lora_llama(), [*data(), item], Collator())


def test_a_first_label_alone_is_nothing_to_learn() -> None:
    with pytest.raises(InvalidArgument, match="none has a label to learn"):
        require_known_values(lora_llama(), [{"input_ids": [1, 3], "labels": [1, -100]}] * 4, Collator())


def test_padding_beyond_the_embeddings_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    ragged = [{"input_ids": [1] * n, "labels": [3] * n} for n in (2, 3)]
    with pytest.raises(InvalidArgument, match=r"^train_dataset='padding': has token"):
        require_known_values(tiny_llama(vocab_size=len(tokenizer) - 1), ragged, AuthorCollator(tokenizer))


def test_all_rows_of_authors_are_looked_at_not_only_those_that_are_chosen() -> None:
    own = [*data(), {"input_ids": [1, 3], "labels": [-100, 401]}]
    items = AuthorItems(own, group_by_author([0] * len(own)), 1)
    for _ in range(5):
        with pytest.raises(InvalidArgument, match=r"item 13 .*label of a token 401"):
            require_known_values(lora_llama(), items, AuthorCollator(tiny_tokenizer()))


def test_random_numbers_and_the_models_mode_stay_as_they_were() -> None:
    def drawing(items: list[Any]) -> dict[str, Tensor]:
        torch.rand(3)
        return stacked(items)

    model = classifier().train()
    before = torch.get_rng_state()
    require_known_values(model, rows(), drawing)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def spent(folder: Path) -> bool:
    return (folder / "ledger.jsonl").exists()


@pytest.mark.parametrize("where", ["trainer", "callback"])
def test_nothing_is_spent_on_a_training_set_with_such_an_item(where: str, tmp_path: Path) -> None:
    bad = [*data(), {"input_ids": [1, 3], "labels": [-100, np.int64(-7).item()]}]
    trainer: Any = dp_trainer(tmp_path, train_dataset=bad)
    if where == "callback":
        trainer, _ = plain_trainer(tmp_path, train_dataset=bad)
    with pytest.raises(InvalidArgument, match=r"item 13 .*label of a token -7"):
        trainer.train()
    assert not spent(tmp_path)
