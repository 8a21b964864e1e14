"""Flags of optimisation: values out of range are refused by their flag, and the rest reaches the optimizer."""

from __future__ import annotations

from typing import Any

import pytest

from dptune import InvalidArgument
from dptune.averaging import NO_AVERAGE, Averaging
from utils.training import optimizers
from utils.training.optimization_arguments import OptimizationArguments
from utils.training.optimizers import UpdateSettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size=0: "),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps=0: "),
        ({"max_tokens_per_device": 0}, "--max_tokens_per_device=0: "),
        ({"num_train_epochs": 0.0}, "--num_train_epochs=0.0: "),
        ({"max_train_steps": 0}, "--max_train_steps=0: "),
        ({"learning_rate": -1.0}, "--learning_rate=-1.0: "),
        ({"num_warmup_steps": -1}, "--num_warmup_steps=-1: "),
        ({"optimizer": "sgd", "learning_rate": 0.1, "momentum": 1.0}, r"--momentum=1.0: give a number in \[0, 1\)"),
        ({"momentum": 0.5}, "--momentum=0.5: belongs to --optimizer sgd, not the default"),
        ({"momentum": 0.5, "optimizer": "adamw"}, "--momentum=0.5: belongs to --optimizer sgd, not adamw"),
        ({"optimizer": "sgd"}, "--learning_rate=None: --optimizer sgd needs it"),
        ({"weight_decay": -0.1}, "--weight_decay=-0.1: give a number of at least 0"),
        ({"weight_decay": float("inf")}, "--weight_decay=inf: give a number of at least 0"),
        ({"warmup_ratio": 1.5}, "--warmup_ratio=1.5: give a share of all steps"),
        ({"warmup_ratio": 0.1, "num_warmup_steps": 3}, "--warmup_ratio=0.1: --num_warmup_steps is 3; give only one"),
        ({"ema": 1.0}, "--ema=1.0: give a decay above 0 and below 1"),
        ({"average_last": 0.0}, "--average_last=0.0: give a share of all steps"),
        ({"ema": 0.9, "average_last": 0.5}, "--average_last=0.5: ema 0.9 already asks for an exponential"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm=-1.0: give a number above 0, or 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        OptimizationArguments(**given)


def test_flags_make_the_optimizers_settings() -> None:
    given: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1, "weight_decay": 0.2}
    given |= {"lr_scheduler_type": "cosine", "num_warmup_steps": 3}
    assert OptimizationArguments(**given).updates == UpdateSettings(**given)
    one = OptimizationArguments(optimizer="adamw", learning_rate=0.1, warmup_ratio=0.2)
    assert one.updates.warmup_ratio == 0.2


def test_an_average_is_released_only_if_it_is_asked_for() -> None:
    assert OptimizationArguments().averaging == NO_AVERAGE
    assert OptimizationArguments(ema=0.9).averaging == Averaging(ema=0.9)
    assert OptimizationArguments(average_last=0.5).averaging == Averaging(average_last=0.5)


@pytest.mark.parametrize("how", ["gather", "reduce"])
def test_ranks_add_gradients_as_the_flag_says(how: str) -> None:
    assert OptimizationArguments(gradient_sync=how).sync == how


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit"])
def test_an_optimizer_of_a_missing_library_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    with pytest.raises(InvalidArgument, match=f"^--optimizer='{name}': needs bitsandbytes: pip install bitsandbytes"):
        OptimizationArguments(optimizer=name)
