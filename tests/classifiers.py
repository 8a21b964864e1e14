"""Tiny random classifiers, without dropout, under each PEFT method that the engine knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCABULARY, CLASSES, PAD, VIRTUAL = 60, 3, 0, 4
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": CLASSES,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64}
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return GPT2ForSequenceClassification(
        GPT2Config(**sizes, **dropout, num_labels=CLASSES, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
    )


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "BERT": lambda: BertForSequenceClassification(BertConfig(**_SIZES, **_NO_DROPOUT)),
    "RoBERTa": lambda: RobertaForSequenceClassification(RobertaConfig(**_SIZES, **_NO_DROPOUT)),
    "Llama": lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "Llama, grouped": lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES, num_key_value_heads=1)),
    "GPT-2": _gpt2,
}
METHODS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: IA3Config(task_type="SEQ_CLS"),
    "prefix": lambda: PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL),
    "prefix, projected": lambda: PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL, prefix_projection=True, encoder_hidden_size=8
    ),
    "soft prompt": lambda: PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL),
}


def classifier(name: str, *, seed: int = 0) -> Any:
    """A classifier in float64 and evaluation mode, with parameters away from their start."""
    torch.manual_seed(seed)
    model = CLASSIFIERS[name]().double().eval()
    shake(model)
    return model


def peft_classifier(name: str, method: str, *, seed: int = 0) -> Any:
    """The same with a PEFT method, away from its start, where an (IA)^3 vector is 1 and hides a missing factor."""
    model = get_peft_model(classifier(name, seed=seed), METHODS[method]()).double().eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move every parameter a little."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


def rows(count: int, *, seed: int = 0, longest: int = 9) -> tuple[list[list[int]], list[int]]:
    """(token ids of unequal lengths, classes)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return ids, torch.randint(CLASSES, (count,), generator=generator).tolist()


def batch(ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The rows, padded on the right."""
    longest = max(map(len, ids))
    padded = [list(row) + [PAD] * (longest - len(row)) for row in ids]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def alone(model: Any, row: Sequence[int], label: int) -> Tensor:
    """The oracle's loss: one row without padding through the model's own forward pass, without code of dptune."""
    logits = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits
    return F.cross_entropy(logits, torch.tensor([label]))


def gradients_alone(model: Any, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> list[dict[str, Tensor]]:
    """One {parameter: gradient} per row."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = []
    for row, label in zip(ids, labels, strict=True):
        grads = torch.autograd.grad(alone(model, row, label), list(trained.values()), allow_unused=True)
        found.append(
            {
                name: torch.zeros_like(parameter) if grad is None else grad
                for (name, parameter), grad in zip(trained.items(), grads, strict=True)
            }
        )
    return found
