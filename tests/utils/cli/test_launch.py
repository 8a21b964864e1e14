"""What a launch decides: precision, processes, sharding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dptune._validate import InvalidArgument
from utils.cli import launch
from utils.cli.launch import Sharding, compute_dtype, loss_scale, make_accelerator, sharding_of_launch


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("no", "cuda", torch.float32),
        ("bf16", "cuda:1", torch.bfloat16),
        ("fp16", "cuda", torch.float16),
        ("no", "cpu", torch.float32),
        ("bf16", "cpu", torch.float32),
        ("fp16", "cpu", torch.float32),
    ],
)
def test_precision_of_the_launch_counts_on_a_gpu_only(precision: str, device: str, expected: torch.dtype) -> None:
    assert compute_dtype(precision, device) is expected


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="mixed_precision='fp8'"):
        compute_dtype("fp8", "cuda")


def test_the_accelerator_has_the_launched_processes() -> None:
    accelerator = make_accelerator()
    assert accelerator.num_processes == 1
    assert accelerator.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_missing_processes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(RuntimeError, match="2 processes were launched, but 1 joined"):
        make_accelerator()


def test_fp16_on_a_cpu_is_float32_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert make_accelerator().device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("has", [True, False])
def test_the_cpu_is_asked_for_where_no_accelerator_can_train(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def made(**kwargs: Any) -> SimpleNamespace:
        asked.update(kwargs)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(launch, "Accelerator", made)
    monkeypatch.setattr(launch, "has_accelerator", lambda: has)
    make_accelerator()
    assert asked.get("cpu", False) is not has


def test_only_fp16_scales_losses_and_by_a_power_of_two() -> None:
    assert loss_scale(torch.float32) == loss_scale(torch.bfloat16) == 1
    assert torch.tensor(loss_scale(torch.float16)).frexp().mantissa == 0.5
    assert loss_scale(torch.float16) >= 256


def test_sharding_is_what_the_launcher_says() -> None:
    assert sharding_of_launch({}) is None
    assert sharding_of_launch({"ACCELERATE_USE_FSDP": "false"}) is None
    assert sharding_of_launch({"ACCELERATE_USE_FSDP": "true"}) == Sharding()
    asked = {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    asked |= {"FSDP_ACTIVATION_CHECKPOINTING": "true", "ACCELERATE_USE_FSDP": "true"}
    assert sharding_of_launch(asked) == Sharding(True, False, True)


def test_a_word_of_fsdp1_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"fsdp_reshard_after_forward='full_shard'.*fsdp_version: 2"):
        sharding_of_launch({"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"})
