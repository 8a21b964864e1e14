"""The check on random items: what an item is made of, what a collator does, and that no private item decides it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config

from dptune import InvalidArgument, add_lora
from dptune.integrations import items as module
from dptune.integrations.authors import AuthorCollator, AuthorLosses
from dptune.integrations.items import check_on_random_items, make_of, random_item, require_short_items
from dptune.integrations.losses import DefaultLosses
from dptune.integrations.vocabulary import Vocabulary
from dptune.per_example import RandomRow
from tests.dptune.integrations.runs import Collator, data, dp_trainer, lora_llama, plain_trainer

WORDS = Vocabulary(tokens_in=50, labels=50, classes=3, types=2)


def check(collate: Any = None, examples: Any = None, losses: Any = None, **how: Any) -> list[int]:
    """The number of losses of each forward pass of the check."""
    model, counts = lora_llama(), []

    def own(inputs: Mapping[str, Any]) -> Tensor:
        found = (losses or DefaultLosses())(model, inputs)
        counts.append(len(found))
        return found

    settings: dict[str, Any] = {"max_length": 24} | how
    check_on_random_items(model, own, collate or Collator(), data() if examples is None else examples, **settings)
    return counts


def test_rows_that_are_padded_on_the_right_pass() -> None:
    assert set(check()) == {2, 1}, "together, and each one alone"


def test_losses_that_couple_items_are_refused() -> None:
    def coupled(model: Any, inputs: Mapping[str, Any]) -> Tensor:
        losses = DefaultLosses()(model, inputs)
        return losses * losses.detach().mean()

    with pytest.raises(InvalidArgument, match=r"a row's loss is .* depending on its padding and on other rows"):
        check(losses=coupled)


def test_a_collator_that_mixes_items_is_refused() -> None:
    def shifted(items: list[Any]) -> dict[str, Tensor]:
        return {name: values.roll(1, 0) for name, values in Collator()(items).items()}

    with pytest.raises(InvalidArgument, match="neighbours"):
        check(shifted)


def test_a_collator_that_makes_several_rows_per_item_is_compared_item_by_item() -> None:
    assert set(check(lambda items: Collator()([item for item in items for _ in range(2)]))) == {4, 2}


def test_items_that_are_lists_of_rows_are_filled_up() -> None:
    rows = [[item] for item in data()]
    assert set(check(AuthorCollator(None), rows, AuthorLosses(), most_rows=3)) == {4, 2, 1}


def test_no_private_value_reaches_the_model_and_the_longest_row_is_tried() -> None:
    """Every item has a token that no random row has, because the model's configuration denies it."""
    widths: set[int] = set()
    model = lora_llama()
    model.config.vocab_size = 300
    private = [{"input_ids": [399] * 5, "labels": [399] * 5}] * 4

    def own(inputs: Mapping[str, Any]) -> Tensor:
        widths.add(inputs["input_ids"].shape[1])
        assert not inputs["input_ids"].eq(399).any()
        assert not inputs["labels"].eq(399).any()
        return DefaultLosses()(model, inputs)

    check_on_random_items(model, own, Collator(), private, max_length=24)
    assert widths == {7, 12, 24}


def test_an_item_that_is_too_long_is_named_by_its_number_alone() -> None:
    with pytest.raises(
        InvalidArgument, match=r"^train_dataset='item 8 \(counted from 1\)': has 25 tokens, more than max_length=24"
    ) as error:
        require_short_items([*data(7), {"input_ids": [7] * 25, "labels": [7] * 25}], make_of(data(1)[0]), 24)
    assert "7, 7" not in str(error.value)


def test_an_item_that_is_made_differently_is_refused() -> None:
    for other in ({"input_ids": [1]}, {"input_ids": [1], "labels": 3}, {"input_ids": [[1]], "labels": [1]}):
        with pytest.raises(InvalidArgument, match=r"item 3 .*: has other keys, kinds of values or shapes"):
            require_short_items([*data(2), other], make_of(data(1)[0]), 24)


def test_items_of_texts_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^train_dataset: its items have neither token ids nor arrays"):
        check(examples=[{"text": "secret"}])


def test_a_collator_that_wants_more_than_numbers_is_told_in_one_line() -> None:
    with pytest.raises(
        InvalidArgument, match=r"^data_collator: cannot take random items .*KeyError: 'weight'"
    ) as error:
        check(lambda items: Collator()(items) | {"weight": torch.stack([item["weight"] for item in items])})
    assert "\n" not in str(error.value)


def test_too_little_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "require_separate_rows", full)
    with pytest.raises(InvalidArgument, match=r"^max_length=24: two random items of that length do not fit in memory"):
        check()


def test_a_random_item_is_made_like_the_first() -> None:
    item = {
        "input_ids": [9] * 4,
        "attention_mask": torch.zeros(4, dtype=torch.int64),
        "special_tokens_mask": np.zeros(4, dtype=np.int64),
        "position_ids": [9] * 4,
        "token_type_ids": [9] * 4,
        "label": 9,
        "weight": 9.0,
        "pixels": np.full((2, 3), 9.0),
        "boxes": np.full((2, 3), 9),
        "text": "secret",
    }
    found = random_item(make_of(item), RandomRow(6, 5), WORDS)
    assert found.keys() == item.keys()
    assert found["input_ids"] == RandomRow(6, 5).tokens(50).tolist()
    assert (found["attention_mask"], found["special_tokens_mask"]) == ([1] * 6, [0] * 6)
    assert (found["position_ids"], found["label"], found["text"]) == (list(range(6)), 2, "")
    assert set(found["token_type_ids"]) <= {0, 1}
    assert found["pixels"].shape == found["boxes"].shape == (2, 3)
    assert not found["boxes"].is_floating_point()
    assert found["weight"] != 9.0
    assert random_item(make_of(([1], 2.0)), RandomRow(3, 5), WORDS)[0] == RandomRow(3, 5).tokens(50).tolist()


@pytest.mark.parametrize("coupled", [False, True])
def test_items_of_features_get_random_features_and_need_no_length(coupled: bool) -> None:
    model = nn.Linear(4, 1)

    def losses(inputs: Mapping[str, Any]) -> Tensor:
        assert not inputs["x"].eq(77.0).any()
        found = model(inputs["x"]).square().flatten(1).mean(1)
        return found * found.detach().mean() if coupled else found

    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([torch.as_tensor(item["x"]) for item in items])}

    def look() -> None:
        check_on_random_items(model, losses, collate, [{"x": torch.full((3, 4), 77.0)}] * 2, max_length=None)

    if not coupled:
        look()
        return
    with pytest.raises(InvalidArgument, match="differ from autograd's"):
        look()


def longrope() -> Any:
    """Positions that switch for the whole micro-batch when one of its rows has more than 16 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    context = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    rope["original_max_position_embeddings"] = 16
    config = Phi3Config(vocab_size=400, initializer_range=0.3, pad_token_id=0, rope_parameters=rope, **sizes, **context)
    model = AutoModelForCausalLM.from_config(config)
    add_lora(model, rank=2, alpha=4.0, targets=["qkv_proj"])
    return model


@pytest.mark.parametrize("long_items", [False, True])
@pytest.mark.parametrize("max_length", [None, 17])
@pytest.mark.parametrize("plain", [False, True])
def test_the_model_alone_decides_whether_it_is_refused(
    plain: bool, max_length: int | None, long_items: bool, tmp_path: Path
) -> None:
    """Whether an item that is long enough to do harm is there."""
    make = (lambda *given, **how: plain_trainer(*given, **how)[0]) if plain else dp_trainer
    short = [{name: values[:16] for name, values in item.items()} for item in data(70)]
    long = [5] * (max_length or 40)
    rows = [*short, *([{"input_ids": long, "labels": long}] if long_items else [])]
    with pytest.raises(InvalidArgument, match="on its padding or on its neighbours"):
        make(tmp_path, longrope(), train_dataset=rows, max_length=max_length).train()


@pytest.mark.parametrize("plain", [False, True])
def test_within_the_switch_the_same_model_trains(plain: bool, tmp_path: Path) -> None:
    make = (lambda *given, **how: plain_trainer(*given, **how)[0]) if plain else dp_trainer
    rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in range(5, 17)]
    trainer = make(tmp_path, longrope(), train_dataset=rows, max_length=16)
    trainer.train()
    assert trainer.state.global_step == 2


def test_dropout_is_off_and_the_mode_is_as_before() -> None:
    model = lora_llama(dropout=0.5).train()
    model.lm_head.eval()
    state = torch.random.get_rng_state()
    own = lambda inputs: DefaultLosses()(model, inputs)  # noqa: E731
    check_on_random_items(model, own, Collator(), data(4), max_length=24)
    assert model.training
    assert not model.lm_head.training, "each module has its own mode again"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
