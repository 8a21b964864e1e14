"""Rows for private causal language modelling: padded on the right, position ids of shape [B, T]."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dptune.integrations.transformers import DataCollatorForPrivateCausalLanguageModeling
from tests.tiny import tiny_tokenizer


def test_rows_are_padded_on_the_right_with_positions_of_their_own() -> None:
    collator = DataCollatorForPrivateCausalLanguageModeling(SimpleNamespace(pad_token_id=9, eos_token_id=2))
    batch = collator([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "text": "x"}, {"input_ids": [6]}])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[3, 4, 5], [6, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "position_ids": [[0, 1, 2], [0, 1, 2]],
        "labels": [[-100, 4, 5], [6, -100, -100]],
    }
    assert batch["position_ids"].is_contiguous()
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_that_a_feature_brings_along_has_no_label() -> None:
    collator = DataCollatorForPrivateCausalLanguageModeling(tiny_tokenizer())
    batch = collator([{"input_ids": [3, 2, 2], "attention_mask": [1, 1, 0]}])
    assert batch["labels"].tolist() == [[3, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0]]


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id is None
    batch = DataCollatorForPrivateCausalLanguageModeling(tokenizer)([{"input_ids": [3, 4]}, {"input_ids": []}])
    assert batch["input_ids"].tolist() == [[3, 4], [tokenizer.eos_token_id] * 2]
    assert batch["labels"].tolist() == [[3, 4], [-100, -100]]


def test_the_width_is_rounded_up() -> None:
    collator = DataCollatorForPrivateCausalLanguageModeling(tiny_tokenizer(), pad_to_multiple_of=4)
    assert collator([{"input_ids": [3, 4, 5, 6, 7]}])["input_ids"].shape == (1, 8)
    assert collator([{"input_ids": []}])["input_ids"].shape == (1, 4)
