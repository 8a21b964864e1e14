"""Every parameter trained under a Trainer: GPT-2 with its tied embeddings, Llama, and a BERT classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from dptune import InvalidArgument
from dptune.integrations.losses import mean_token_losses
from tests.dptune.integrations.runs import (
    GradientLog,
    dp_trainer,
    draws,
    expected_gradient,
    no_noise,  # noqa: F401
    plain_trainer,
    privacy_arguments,
)
from tests.examples import random_examples
from tests.reference import flat
from tests.tiny import tiny_llama


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 400, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))


def whole_llama() -> Any:
    return tiny_llama(layers=1)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("make_trainer", [dp_trainer, lambda *args, **kwargs: plain_trainer(*args, **kwargs)[0]])
@pytest.mark.parametrize("make_model", [tiny_gpt2, whole_llama])
@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_the_noiseless_gradient_is_the_oracles(
    tmp_path: Path, make_trainer: Callable[..., Any], make_model: Callable[[], Any], clip_norm: float
) -> None:
    model, log = make_model(), GradientLog()
    untouched = copy.deepcopy(model)
    privacy = privacy_arguments(clip_norm=clip_norm)
    trainer = make_trainer(tmp_path, model, privacy=privacy, callbacks=[log], save_strategy="steps", save_steps=1)
    trainer.train()
    expected = expected_gradient(untouched, draws(1)[0], clip_norm=clip_norm)
    torch.testing.assert_close(log.grads[0], expected, rtol=1e-3, atol=2e-6 * max(1.0, clip_norm / 10))
    assert log.grads[0].norm() > 0.1
    assert len(log.grads) == 2
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


@pytest.mark.usefixtures("no_noise")
def test_gpt2_trains_in_bf16_autocast_with_activation_checkpointing(tmp_path: Path) -> None:
    model, log = tiny_gpt2(), GradientLog()
    untouched = copy.deepcopy(model)
    dp_trainer(tmp_path, model, callbacks=[log], max_steps=1, bf16=True, gradient_checkpointing=True).train()
    expected = expected_gradient(untouched, draws(1)[0])
    assert (log.grads[0] - expected).norm() < 0.02 * expected.norm()
    assert (log.grads[0] - expected).norm() > 1e-5 * expected.norm()  # the layer was not float32 after all
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def bert_rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": number % 3} for number, (ids, _) in enumerate(random_examples(12))]


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(feature["input_ids"]) for feature in features)
    ids = [feature["input_ids"] + [0] * (width - len(feature["input_ids"])) for feature in features]
    mask = [[1] * len(feature["input_ids"]) + [0] * (width - len(feature["input_ids"])) for feature in features]
    labels = torch.tensor([feature["labels"] for feature in features])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": labels}


@pytest.mark.usefixtures("no_noise")
def test_a_whole_bert_classifier_is_the_oracles(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=400, num_labels=3, **sizes, **dropout))
    double, log = copy.deepcopy(model).double(), GradientLog()
    expected = torch.zeros(sum(parameter.numel() for parameter in model.parameters()), dtype=torch.float64)
    for row in draws(1)[0]:
        batch = collate([bert_rows()[row]])
        loss = F.cross_entropy(double(input_ids=batch["input_ids"]).logits, batch["labels"])
        grad = flat(dict(enumerate(torch.autograd.grad(loss, list(double.parameters())))))  # type: ignore[arg-type]
        expected += grad * min(1.0, 0.5 / grad.norm().item()) / 6
    dp_trainer(tmp_path, model, train_dataset=bert_rows(), data_collator=collate, callbacks=[log], max_steps=1).train()
    torch.testing.assert_close(log.grads[0], expected, rtol=1e-3, atol=2e-6)


class UsesItsEmbeddingElsewhere(GPT2LMHeadModel):
    """A model that no rule can describe: its logits use the embedding outside any layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.transformer.wte.weight.sum(1)
        return output


def test_a_model_that_the_rules_do_not_describe_is_refused_before_a_step(tmp_path: Path) -> None:
    model = UsesItsEmbeddingElsewhere(tiny_gpt2().config)

    def losses(model: Any, inputs: Any) -> torch.Tensor:
        return mean_token_losses(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])

    trainer = dp_trainer(tmp_path, model, privacy=privacy_arguments(), losses=losses)
    with pytest.raises(InvalidArgument, match=r"wte\.weight: its per-example gradients differ from autograd's"):
        trainer.train()
    assert not (tmp_path / "ledger.jsonl").exists()
