"""Token dropout: what it replaces, when, and with what; and models whose views would all be the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument, add_lora
from dptune.randomness import new_randomness
from tests.classifier_folders import word_tokenizer
from tests.classifiers import classifier, peft_classifier
from tests.tiny import tiny_llama, tiny_tokenizer
from utils.training.view_arguments import ViewArguments
from utils.training.views import has_dropout, require_different_views, with_token_dropout

TOKENIZER = tiny_tokenizer()
TOKENIZER.pad_token = TOKENIZER.eos_token
SPECIAL = {0, 1, 2}
CPU = torch.device("cpu")


def tokens(rows: int = 200, width: int = 50) -> Tensor:
    """Random rows that begin with <s> and end with </s> and padding."""
    ids = torch.randint(3, len(TOKENIZER), (rows, width), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -5:], ids[:, 7] = 1, 2, 0
    return ids


@cache
def llama(size: int) -> nn.Module:
    """Made once, because making it seeds torch's generator."""
    return tiny_llama(vocab_size=size)


def seen_in(
    ids: Tensor, probability: float = 0.3, *, training: bool = True, tokenizer: Any = TOKENIZER, size: int = 400
) -> Tensor:
    """What the model sees of rows."""
    model, found = llama(size), list[Tensor]()

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(labels, ids)
        found.append(input_ids)
        return input_ids.float().sum(1)

    model.train(training)
    made = with_token_dropout(losses, model, tokenizer, probability, CPU)(input_ids=ids.clone(), labels=ids.clone())
    assert torch.equal(made, found[0].float().sum(1))
    return found[0]


def test_each_ordinary_token_is_replaced_with_the_probability_and_nothing_else_is() -> None:
    ids = tokens()
    for probability in (0.1, 0.5):
        seen = seen_in(ids, probability)
        ordinary, changed = ids >= 3, seen != ids
        assert not changed[~ordinary].any()
        share = float(changed[ordinary].float().mean())
        expected = probability * (1 - 1 / (len(TOKENIZER) - 3))  # a token may be replaced by itself
        assert abs(share - expected) < 5 * (probability * (1 - probability) / int(ordinary.sum())) ** 0.5
        assert not SPECIAL & set(seen[changed].tolist())
        assert len(set(seen[changed].tolist())) > 100, "any token of the vocabulary"


def test_each_row_and_each_place_is_chosen_by_itself() -> None:
    """Views are rows of a batch, so copies of one row lose different tokens."""
    changed = (seen_in(tokens(1).repeat(400, 1)) != tokens(1))[:, 10:40].double()
    correlation = torch.corrcoef(changed.T) - torch.eye(30, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 400**0.5
    assert len({tuple(row) for row in changed.tolist()}) > 390
    assert torch.corrcoef(changed).fill_diagonal_(0).mean().abs() < 0.02


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_evaluation_sees_the_rows_as_they_are(probability: float) -> None:
    assert torch.equal(seen_in(tokens(), probability, training=False), tokens())


def test_without_token_dropout_the_losses_are_untouched() -> None:
    losses: Callable[..., Tensor] = torch.sum
    assert with_token_dropout(losses, tiny_llama(), TOKENIZER, 0.0, CPU) is losses


def test_a_mask_token_stands_for_what_is_gone() -> None:
    tokenizer = word_tokenizer(encoder=True)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    ids = torch.randint(0, 15, (50, 20), generator=torch.Generator().manual_seed(0))
    seen = seen_in(ids, tokenizer=tokenizer)
    assert set(seen[seen != ids].tolist()) == {tokenizer.mask_token_id}
    assert not set(ids[seen != ids].tolist()) & set(tokenizer.all_special_ids)


def test_tokens_that_the_model_lacks_are_neither_drawn_nor_looked_up() -> None:
    """A tokenizer may have more tokens than the model has embeddings, a mask token among them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    ids, size = tokens() % 100, 100
    assert tokenizer.mask_token_id >= size
    seen = seen_in(ids, tokenizer=tokenizer, size=size)
    assert (seen != ids).any()
    assert int(seen.max()) < size


def test_masks_are_those_of_the_run_and_differ_by_rank_and_step() -> None:
    def drawn(rank: int, step: int, seed: int | None) -> Tensor:
        new_randomness(rank, step, test_seed=seed)
        return seen_in(tokens())

    first = drawn(0, 1, 3)
    assert torch.equal(first, drawn(0, 1, 3))
    others = [drawn(1, 1, 3), drawn(0, 2, 3), drawn(0, 1, 4), drawn(0, 1, None), drawn(0, 1, None)]
    assert len({tuple(one.flatten().tolist()) for one in (first, *others)}) == 6


# --- views that would all be the same ---


def with_lora_dropout(dropout: float) -> nn.Module:
    model = tiny_llama()
    add_lora(model, rank=2, dropout=dropout)
    return model


def with_attention_dropout(dropout: float) -> nn.Module:
    model = tiny_llama()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def bert_with_dropout(dropout: float) -> nn.Module:
    model = classifier("BERT")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


@pytest.mark.parametrize("make", [with_lora_dropout, with_attention_dropout, bert_with_dropout])
def test_dropout_is_found_wherever_it_is(make: Callable[[float], nn.Module]) -> None:
    assert has_dropout(make(0.1))
    assert not has_dropout(make(0.0))


@pytest.mark.parametrize("name", ["GPT-2", "RoBERTa", "Llama"])
def test_a_model_without_dropout_has_none(name: str) -> None:
    assert not has_dropout(classifier(name))
    assert not has_dropout(peft_classifier(name, "ia3"))


def test_views_that_would_all_be_the_same_are_refused_with_the_remedy() -> None:
    told = r"^--views=4: the model has no dropout, so all views would be the same; give --token_dropout, such as 0\.1"
    with pytest.raises(InvalidArgument, match=told):
        require_different_views(ViewArguments(views=4), with_lora_dropout(0.0))
    require_different_views(ViewArguments(views=1), with_lora_dropout(0.0))
    require_different_views(ViewArguments(views=4), with_lora_dropout(0.1))
    require_different_views(ViewArguments(views=4, token_dropout=0.1), with_lora_dropout(0.0))
