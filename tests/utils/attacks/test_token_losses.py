"""Losses of tokens are those of each row alone, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dptune.losses import CausalLMLoss
from tests.tiny import tiny_llama, tiny_tokenizer
from utils.attacks import token_losses as module
from utils.attacks.token_losses import token_losses
from utils.data.record import prompt_and_answer
from utils.data.tokenization import tokenize

ROWS = [("Say: ", "the cat sat"), ("", "a dog ran over the hill to see the sun"), ("Hello. ", "I am fine, thank you")]


@pytest.mark.parametrize("most", [1, 40, 10_000])
def test_each_row_has_the_losses_that_it_has_alone(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TOKENS", most)
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    data = tokenize([prompt_and_answer(*row) for row in ROWS], tokenizer, 64)
    wanted = [2, 0, 1, 0]
    found = token_losses(model, data, wanted, pad_token_id=0)
    for row, losses in zip(wanted, found, strict=True):
        span = slice(data.starts[row], data.starts[row + 1])
        ids, learned = torch.from_numpy(data.ids[span].astype(np.int64)), data.is_answer[span]
        with torch.no_grad():
            alone = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").numpy()
        assert losses == pytest.approx(alone[learned[1:]], abs=1e-5)
        assert len(losses) == data.num_answer_tokens[row]


def test_their_mean_is_the_loss_of_training() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    data = tokenize([prompt_and_answer(*row) for row in ROWS], tokenizer, 64)
    batch = data.batch(range(3), 0)
    with torch.no_grad():
        wanted = CausalLMLoss(model)(batch["input_ids"], batch["labels"])
    found = [one.mean() for one in token_losses(model, data, range(3), pad_token_id=0)]
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)
