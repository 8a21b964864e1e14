"""Default losses: one per row, each from that row alone; unknown tasks and inputs are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from dptune import InvalidArgument, add_lora
from dptune.clipping import clip_factors
from dptune.integrations.losses import DefaultLosses, losses_of_outputs
from tests.classifiers import batch, peft_classifier
from tests.dptune.integrations.runs import (  # noqa: F401
    SEED,
    Collator,
    GradientLog,
    data,
    dp_trainer,
    draws,
    no_noise,
    plain_trainer,
    privacy_arguments,
)
from tests.examples import random_examples, randomise_adapters
from tests.reference import example_loss
from tests.tiny import tiny_llama


def bert_config(**changed: Any) -> BertConfig:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(**(sizes | {"vocab_size": 60, "max_position_embeddings": 32} | changed))


def test_language_modelling_losses_are_the_oracles_and_ignore_neighbours() -> None:
    model, examples = tiny_llama(), random_examples(5)
    batch = Collator()(data(5))
    expected = torch.stack([example_loss(model, example) for example in examples])
    losses = DefaultLosses()
    torch.testing.assert_close(losses(model, batch), expected)
    torch.testing.assert_close(losses_of_outputs(model, model(**batch), batch["labels"]), expected)
    alone = losses(model, Collator()(data(5)[:1]))
    torch.testing.assert_close(alone, expected[:1])


def test_a_row_without_labels_has_loss_zero() -> None:
    model, batch = tiny_llama(), Collator()(data(2))
    batch["labels"][1] = -100
    assert DefaultLosses()(model, batch)[1] == 0
    assert losses_of_outputs(model, model(**batch), batch["labels"])[1] == 0


def test_classification_losses_are_each_rows_own() -> None:
    model = BertForSequenceClassification(bert_config(num_labels=3)).eval()
    ids, labels = torch.randint(1, 60, (4, 7)), torch.tensor([0, 2, 1, 1])
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits, labels, reduction="none")
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(DefaultLosses()(model, batch), expected)
    torch.testing.assert_close(losses_of_outputs(model, model(**batch), labels), expected)


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (lambda: BertForMaskedLM(bert_config()), torch.zeros(2, 7, dtype=torch.int64)),
        (lambda: BertForSequenceClassification(bert_config(num_labels=1)), torch.zeros(2)),
        (lambda: BertForSequenceClassification(bert_config(num_labels=1)), torch.zeros(2, dtype=torch.int64)),
        (lambda: BertForSequenceClassification(bert_config(num_labels=3)), torch.zeros(2, 3)),
        (lambda: tiny_llama(), None),
    ],
)
def test_an_unknown_task_is_refused_with_the_remedy(model: Any, labels: Any) -> None:
    batch = {"input_ids": torch.ones(2, 7, dtype=torch.int64)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(InvalidArgument, match="pass your own function"):
        DefaultLosses()(model(), batch)


def test_a_language_model_that_sees_ahead_is_refused() -> None:
    batch = Collator()([{"input_ids": [5, 6, 7]}])
    with pytest.raises(InvalidArgument, match="see later tokens"):
        DefaultLosses()(BertLMHeadModel(bert_config()), batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.tensor([[0, 1, 1]])),
        ("position_ids", torch.tensor([[1, 2, 3]])),
        ("token_type_ids", torch.tensor([[0, 0, 0]])),
        ("attention_mask", torch.tensor([[1, 1, 0]])),
    ],
)
def test_inputs_that_the_default_loss_would_ignore_are_refused(name: str, value: torch.Tensor) -> None:
    batch = Collator()([{"input_ids": [5, 6, 7]}]) | {name: value}
    with pytest.raises(InvalidArgument):
        DefaultLosses()(tiny_llama(), batch)


def classifier() -> Any:
    """A Llama with a classification head; only adapters and the head train."""
    config = tiny_llama(layers=1).config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    add_lora(model, rank=2, alpha=4.0, targets=["q_proj"])
    randomise_adapters(model)
    model.score.weight.requires_grad_(True)
    return model


def test_a_soft_prompt_is_classified_by_its_own_tokens() -> None:
    """Also the loss of `DPTrainer`. A loop that calls the model itself is refused: it would pool over padding."""
    model = peft_classifier("Llama", "soft prompt")
    inputs = batch([[5, 6], [7, 8, 9, 10]]) | {"labels": torch.tensor([0, 1])}
    alone = DefaultLosses()(model, batch([[5, 6]]) | {"labels": torch.tensor([0])})
    torch.testing.assert_close(DefaultLosses()(model, inputs)[:1], alone)
    with pytest.raises(InvalidArgument, match="PROMPT_TUNING"):
        losses_of_outputs(model, model(**inputs), inputs["labels"])


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": number % 3} for number, (ids, _) in enumerate(random_examples(12))]


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = Collator()([{"input_ids": feature["input_ids"]} for feature in features])
    del batch["position_ids"]
    return batch | {"labels": torch.tensor([feature["labels"] for feature in features])}


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("plain", [False, True])
def test_a_classifier_trains_on_its_clipped_sum(tmp_path: Path, plain: bool) -> None:
    model, log = classifier(), GradientLog()
    expected = torch.zeros(1)
    for row in draws(1)[0]:
        batch = collate([rows()[row]])
        loss = F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        grad = torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])
        expected = expected + grad * clip_factors(grad.norm()[None].double(), 0.5)[0] / 6
    settings: dict[str, Any] = {"train_dataset": rows(), "data_collator": collate, "callbacks": [log], "max_steps": 1}
    trainer = plain_trainer(tmp_path, model, **settings)[0] if plain else dp_trainer(tmp_path, model, **settings)
    trainer.train()
    torch.testing.assert_close(log.grads[0], expected.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_noise")
def test_adapters_of_peft_train_too(tmp_path: Path) -> None:

    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(layers=1), peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0))
    randomise_adapters(model)
    log = GradientLog()
    trainer = dp_trainer(tmp_path, model, callbacks=[log], max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert len(log.grads) == 2
    assert all(0 < grad.norm() <= 0.5 * len(draw) / 6 + 1e-6 for grad, draw in zip(log.grads, draws(2), strict=True))
    assert privacy_arguments().insecure_test_seed == SEED


def without_a_mask(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in collate(features).items() if name != "attention_mask"}


def padded_on_the_left(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    inputs = Collator()(features)
    for row, feature in enumerate(features):
        shift = inputs["input_ids"].shape[1] - len(feature["input_ids"])
        for name in ("input_ids", "labels", "attention_mask"):
            inputs[name][row] = inputs[name][row].roll(shift)
    return {name: inputs[name] for name in ("input_ids", "labels", "attention_mask")}


@pytest.mark.parametrize("plain", [False, True])
def test_an_encoder_whose_padding_is_not_masked_is_refused(tmp_path: Path, plain: bool) -> None:
    """Each row's loss would depend on the length of its longest neighbour."""
    make = (lambda *given, **how: plain_trainer(*given, **how)[0]) if plain else dp_trainer
    settings = {"train_dataset": rows(), "data_collator": without_a_mask}
    trainer = make(
        tmp_path,
        BertForSequenceClassification(bert_config(num_labels=3, vocab_size=400, initializer_range=0.3)),
        **settings,
    )
    with pytest.raises(InvalidArgument, match="on its padding or on its neighbours"):
        trainer.train()
    assert not (tmp_path / "publish" / "privacy_report.json").exists()


def test_a_language_model_whose_rows_are_padded_on_the_left_is_refused(tmp_path: Path) -> None:
    """If a loop calls the model itself, positions would count from the start of the longest neighbour."""
    features = [{"input_ids": ids, "labels": ids} for ids, _ in random_examples(12)]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    trainer, _ = plain_trainer(tmp_path, model, train_dataset=features, data_collator=padded_on_the_left)
    with pytest.raises(InvalidArgument, match="on its padding or on its neighbours"):
        trainer.train()
