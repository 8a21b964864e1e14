"""Which tokens and classes a model takes, and how many tokens: from its configuration, or asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from dptune import InvalidArgument
from dptune.integrations.vocabulary import Vocabulary, context_of, longest_item
from dptune.per_example import RandomRow
from tests.dptune.integrations.runs import lora_llama

SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
ROW = RandomRow(20, 1)


def bert(kind: Any = BertForSequenceClassification) -> Any:
    return kind(BertConfig(**SIZES, vocab_size=60, max_position_embeddings=32, num_labels=3))


def test_a_language_models_labels_are_its_tokens() -> None:
    vocabulary = Vocabulary.of(lora_llama())
    assert vocabulary == Vocabulary(tokens_in=400, labels=400, classes=2, types=1)
    assert torch.equal(vocabulary.tokens("labels", ROW), vocabulary.tokens("input_ids", ROW))


def test_a_classifiers_labels_are_classes() -> None:
    assert Vocabulary.of(bert()) == Vocabulary(tokens_in=60, labels=3, classes=3, types=2)
    assert Vocabulary.of(bert(BertForTokenClassification)).tokens("labels", ROW).max() < 3
    assert [Vocabulary.of(bert()).number("label", RandomRow(1, number)) for number in range(4)] == [0, 1, 2, 0]


def test_a_model_without_a_configuration_is_asked_for_its_first_embedding() -> None:
    assert Vocabulary.of(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))).tokens_in == 9
    assert Vocabulary.of(nn.Linear(4, 4)).tokens("x", ROW).max() < 2


def test_the_context_is_what_is_left_for_text() -> None:
    assert context_of(bert()) == 32
    assert context_of(Roberta(RobertaConfig(**SIZES, max_position_embeddings=32))) == 30, "two are reserved"
    prompted = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=32),
        active_peft_config=SimpleNamespace(num_virtual_tokens=5),
        named_modules=dict,
    )
    assert context_of(prompted) == 27
    assert context_of(nn.Linear(4, 4)) is None


def test_the_longest_item_is_given_or_the_context() -> None:
    assert longest_item(bert(), None) == 32
    assert longest_item(bert(), 9) == 9
    assert longest_item(nn.Linear(4, 4), 9) == 9


@pytest.mark.parametrize(
    ("context", "given", "line"),
    [
        (None, None, "max_length=None: the model does not say how many tokens it takes; give the largest number"),
        (8192, None, "max_length=None: the model takes 8,192 tokens; give the largest number of tokens"),
        (32, 33, "max_length=33: the model's context is 32 tokens; give at most that"),
        (32, 0, "max_length=0: give a whole number of at least 1"),
    ],
)
def test_what_cannot_be_tried_is_asked_for(context: int | None, given: int | None, line: str) -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context), named_modules=dict)
    with pytest.raises(InvalidArgument) as error:
        longest_item(model, given)
    assert str(error.value).startswith(line)
