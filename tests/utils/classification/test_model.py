"""The model in its mode: what is adapted, and what is said of its rates."""

from __future__ import annotations

from typing import Any

import torch

from dptune.lora import adapters, linear_layers
from utils.classification.model import describe_rates, load_in_mode
from utils.training.optimizers import UpdateSettings


def test_the_start_is_the_seeds(planned: Any) -> None:
    one, other = (planned(seed=seed)[0] for seed in (1, 2))
    tokenizer = planned()[1]
    first, again, different = (load_in_mode(p.task, p.settings, tokenizer, p.plan.privacy) for p in (one, one, other))
    weights = [torch.cat([p.flatten() for p in trained.model.parameters()]) for trained in (first, again, different)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.checkpoint == different.checkpoint, "what is new is not the checkpoint's"


def test_all_linear_adapts_every_layer_of_the_encoder_and_not_the_head(planned: Any) -> None:
    task, tokenizer, _ = planned(lora_target_modules="all-linear", use_rslora=True, lora_r=4)
    trained = load_in_mode(task.task, task.settings, tokenizer, task.plan.privacy)
    found = dict(adapters(trained.model))
    layers = {name for name in linear_layers(trained.model) if name.startswith("bert.")}
    assert set(found) == layers
    assert {adapter.scale for adapter in found.values()} == {16 * 2 / 4}


def test_rates_are_told() -> None:
    updates = UpdateSettings("adamw", 0.01, 0.0, head_learning_rate=0.01)
    assert describe_rates(updates, chosen=True) == "learning rate          0.01"
    other = UpdateSettings("adamw", 0.01, 0.0, head_learning_rate=0.5)
    assert describe_rates(other, chosen=False).endswith("0.01 (default of this mode), 0.5 for the head")
