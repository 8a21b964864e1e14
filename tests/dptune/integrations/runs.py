"""Tiny private Trainers, without noise where a test looks at the gradient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from dptune import Keystream, PoissonSampler, add_lora
from dptune.integrations.transformers import (
    DataCollatorForPrivateCausalLanguageModeling,
    DPTrainer,
    PrivacyArguments,
    PrivacyEngine,
    PrivacyEngineCallback,
    TrainingArguments,
)
from dptune.ledger import LEDGER_NAME
from tests.examples import random_examples, randomise_adapters
from tests.private_sum import NoNoise
from tests.reference import Example, clipped_sum, example_gradients
from tests.tiny import tiny_llama

COUNT = 12
LONGEST = 32  # tokens of an item
SEED = 10


class Silent(NoNoise):
    """Zeros instead of noise, with a key that the report treats as fixed."""

    def __init__(self, size: int, keystream: Keystream | None = None, *, device: torch.device | None = None) -> None:
        super().__init__(size, device=device)
        self.keystream = keystream or Keystream.for_tests("silent")

    def take(self) -> Tensor:
        """What a resumed run skips."""
        return torch.zeros(self.size)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of this test add no noise."""
    monkeypatch.setattr("dptune.run.session.GaussianNoise", Silent)


class Collator(DataCollatorForPrivateCausalLanguageModeling):
    """Padding with token 0."""

    def __init__(self) -> None:
        super().__init__(tokenizer=None)


class GradientLog(transformers.TrainerCallback):
    """Keeps the gradient of every optimizer step, flat float64."""

    def __init__(self) -> None:
        self.grads: list[Tensor] = []

    def on_pre_optimizer_step(self, *_event: Any, model: Any = None, **_: Any) -> None:
        self.grads.append(flat_grad(model))


def flat_grad(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def lora_llama(seed: int = 0, *, dropout: float = 0.0) -> Any:
    model = tiny_llama(seed, layers=1)
    add_lora(model, rank=2, alpha=4.0, targets=["q_proj", "v_proj", "down_proj"], dropout=dropout)
    randomise_adapters(model, seed)
    return model


def features(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": labels} for ids, labels in examples]


def data(count: int = COUNT, seed: int = 0) -> list[dict[str, list[int]]]:
    return features(random_examples(count, seed=seed))


def training_arguments(folder: Path, kind: Any = TrainingArguments, **changed: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return kind(**(settings | changed))


def privacy_arguments(**changed: Any) -> PrivacyArguments:
    settings: dict[str, Any] = {"insecure_test_seed": SEED}
    if not changed.get("disable_dp"):
        settings |= {"clip_norm": 0.5, "delta": 1e-3}
        if "target_epsilon" not in changed:
            settings["noise_multiplier"] = 1.0
    return PrivacyArguments(**(settings | changed))


def dp_trainer(
    folder: Path, model: Any = None, *, privacy: PrivacyArguments | None = None, **changed: Any
) -> DPTrainer:
    own = {name: changed.pop(name) for name in _TRAINERS & changed.keys()}
    model = lora_llama() if model is None else model
    settings = {"train_dataset": data(), "data_collator": Collator(), "max_length": LONGEST} | own
    return DPTrainer(
        model, training_arguments(folder, **changed), privacy_args=privacy or privacy_arguments(), **settings
    )


def plain_trainer(
    folder: Path, model: Any = None, *, privacy: PrivacyArguments | None = None, **changed: Any
) -> tuple[transformers.Trainer, PrivacyEngine]:
    """A plain transformers Trainer, made private by the callback."""
    own = {name: changed.pop(name) for name in _TRAINERS & changed.keys()}
    model = lora_llama() if model is None else model
    args = training_arguments(folder, transformers.TrainingArguments, **changed)
    rows, longest = own.pop("train_dataset", data()), own.pop("max_length", LONGEST)
    engine = PrivacyEngine(model, args, rows, privacy or privacy_arguments(), max_length=longest)
    callbacks = [PrivacyEngineCallback(engine), *own.pop("callbacks", [])]
    dataset = own.pop("train_dataset_of_trainer", engine.dataset)
    settings = {"train_dataset": dataset, "data_collator": Collator(), "compute_loss_func": engine.loss} | own
    return transformers.Trainer(model, args, callbacks=callbacks, **settings), engine


def draws(steps: int, *, count: int = COUNT, batch: int = 6) -> list[list[int]]:
    """The draws of a run under the tests' seed."""
    sampler = PoissonSampler(count, batch / count, Keystream.for_tests(f"{SEED} sampling"))
    return [sampler.draw().tolist() for _ in range(steps)]


def expected_gradient(
    model: Any,
    draw: Sequence[int],
    *,
    clip_norm: float = 0.5,
    batch: int = 6,
    examples: Sequence[Example] | None = None,
) -> Tensor:
    """What a noiseless step on `draw` should release, by the slow oracle."""
    drawn = [(examples or random_examples(COUNT))[row] for row in draw]
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return clipped_sum(example_gradients(model, drawn), clip_norm, size) / batch


_TRAINERS = {
    "max_length",
    "train_dataset",
    "train_dataset_of_trainer",
    "eval_dataset",
    "data_collator",
    "losses",
    "callbacks",
    "clipping",
    "compute_metrics",
    "compute_loss_func",
    "rows_per_unit",
    "privacy_unit",
    "optimizers",
}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The ledger of a run, a dictionary per step."""
    return [json.loads(line) for line in (folder / LEDGER_NAME).read_text().splitlines()]
