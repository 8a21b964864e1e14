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
WIDER = {"input_ids": [2, 3, 4, 5], "attention_mask": [1] * 4}


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


def bert_rows(**last: Any) -> list[dict[str, Any]]:
    """Rows with all that BERT reads; the last one is changed."""
    made = {"input_ids": [2, 3, 4], "attention_mask": [1] * 3, "token_type_ids": [0, 0, 1], "position_ids": [0, 1, 2]}
    return [*({**made, "labels": n % 3} for n in range(COUNT - 1)), {**made, "labels": 0} | last]


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ({"token_type_ids": [0, 2, 1]}, "has token type 2, but the model has 2, from 0 to 1; fix token_type_ids"),
        ({"position_ids": [0, 1, 512]}, "has position 512, but the model has 512, from 0 to 511; fix position_ids"),
        ({"position_ids": [0, -1, 1]}, "has position -1, "),
        ({"token_type_ids": [0, 0]}, "has 2 values in token_type_ids for 3 tokens; give one for each token"),
        ({"attention_mask": [1] * 4}, "has 4 values in attention_mask for 3 tokens; "),
        ({name: [] for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids")}, "has no token; "),
        ({"labels": "one"}, r"cannot be collated \(ValueError\); fix the item, or data_collator"),
    ],
)
@pytest.mark.parametrize("labels", [True, False])
def test_what_ends_a_run_at_the_step_that_draws_it_is_named(last: dict[str, Any], told: str, labels: bool) -> None:
    with pytest.raises(InvalidArgument, match=rf"^train_dataset='item {COUNT} \(counted from 1\)': {told}") as error:
        require_known_values(classifier(), bert_rows(**last), stacked, labels=labels)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None, "an error of the collator may quote the item"


def test_items_that_cannot_be_collated_together_are_told_too() -> None:
    with pytest.raises(InvalidArgument, match=r"^data_collator: fails on items 257 to 512 together \(ValueError\)"):
        require_known_values(classifier(), [*rows()[:-100], rows()[0] | WIDER, *rows()[-100:]], stacked)


def test_the_model_runs_on_a_random_item_alone() -> None:
    """The first item is longer than the model's context, and has a token that no random item has."""
    model, seen = classifier(), []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    long = {"input_ids": [1] * 600, "attention_mask": [1] * 600, "labels": 0}
    with pytest.raises(InvalidArgument, match=r"item 1 .*has 600 tokens, more than max_length=512"):
        require_known_values(model, [long], stacked, longest=512)
    require_known_values(model, [long], stacked)
    assert [ids.shape for ids in seen] == [(1, 7)]
    assert not torch.equal(seen[0], torch.ones(1, 7, dtype=torch.int64))


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


PLAIN = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "attention_mask": [1] * 4}
UNPLAIN = {
    "padded on the left": ({"attention_mask": [0, 1, 1, 1]}, "attention_mask: rows must be padded on the right"),
    "a hole": ({"attention_mask": [1, 0, 1, 1]}, "attention_mask: rows must be padded on the right"),
    "fewer labels": ({"labels": [5, 6, 7]}, "has 3 values in labels for 4 tokens"),
    "a label that is not read": ({"attention_mask": [1, 1, 1, 0]}, "labels: there is a label where the attention mask"),
    "packed": ({"position_ids": [0, 1, 0, 1]}, "position_ids: must count from 0"),
}


@pytest.mark.parametrize("kind", UNPLAIN)
def test_rows_that_the_default_loss_does_not_take_are_named(kind: str) -> None:
    last, told = UNPLAIN[kind]
    count = [PLAIN | ({"position_ids": [0, 1, 2, 3]} if "position_ids" in last else {})] * 3
    with pytest.raises(InvalidArgument, match=rf"^train_dataset='item 4 \(counted from 1\)': {told}"):
        require_known_values(lora_llama(), [*count, PLAIN | last], stacked, plain=True)


def test_a_collator_that_pads_on_the_left_is_told_without_an_item() -> None:
    def left(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        wide = [
            {name: [fill] * (4 - len(item["labels"])) + item[name] for name, fill in FILLS.items()} for item in items
        ]
        width = max(len(item["labels"]) for item in items)
        return {name: values[:, -width:] for name, values in stacked(wide).items()}

    short = {name: values[:2] for name, values in PLAIN.items()}
    with pytest.raises(InvalidArgument, match=r"^attention_mask=\(2, 4\): rows must be padded on the right"):
        require_known_values(lora_llama(), [PLAIN, short], left, plain=True)


FILLS = {"input_ids": 0, "attention_mask": 0, "labels": -100}


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


@pytest.mark.parametrize("kind", ["padded on the left", "a hole", "fewer labels"])
def test_nothing_is_spent_on_rows_that_the_default_loss_does_not_take(kind: str, tmp_path: Path) -> None:
    bad = [*([PLAIN] * 12), PLAIN | UNPLAIN[kind][0]]
    with pytest.raises(InvalidArgument, match="item 13 "):
        dp_trainer(tmp_path, train_dataset=bad).train()
    assert not spent(tmp_path)


@pytest.mark.parametrize("where", ["trainer", "callback"])
@pytest.mark.parametrize("bad", [[5] * 33, []])
def test_nothing_is_spent_on_an_item_of_a_length_that_is_not_allowed(
    bad: list[int], where: str, tmp_path: Path
) -> None:
    rows = [*data(), {"input_ids": bad, "labels": bad}]
    trainer: Any = dp_trainer(tmp_path, train_dataset=rows)
    if where == "callback":
        trainer, _ = plain_trainer(tmp_path, train_dataset=rows)
    with pytest.raises(InvalidArgument, match=r"item 13 .*has (no token|33 tokens, more than max_length=32)"):
        trainer.train()
    assert not spent(tmp_path)


@pytest.mark.parametrize("where", ["trainer", "callback"])
def test_nothing_is_spent_on_a_training_set_with_such_an_item(where: str, tmp_path: Path) -> None:
    bad = [*data(), {"input_ids": [1, 3], "labels": [-100, np.int64(-7).item()]}]
    trainer: Any = dp_trainer(tmp_path, train_dataset=bad)
    if where == "callback":
        trainer, _ = plain_trainer(tmp_path, train_dataset=bad)
    with pytest.raises(InvalidArgument, match=r"item 13 .*label of a token -7"):
        trainer.train()
    assert not spent(tmp_path)
