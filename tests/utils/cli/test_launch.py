"""What a launch decides: precision, processes, sharding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dptune._validate import InvalidArgument
from utils.cli import launch
from utils.cli.launch import (
    Sharding,
    compute_dtype,
    describe_precision,
    loss_scale,
    make_accelerator,
    precision_of_launch,
    refuse_launch,
    sharding_of_launch,
)


@pytest.mark.parametrize(
    ("precision", "device", "processor", "expected"),
    [
        ("no", "cuda", {}, torch.float32),
        ("bf16", "cuda:1", {}, torch.bfloat16),
        ("fp16", "cuda", {}, torch.float16),
        ("no", "cpu", {"avx512_bf16": True}, torch.float32),
        ("bf16", "cpu", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("bf16", "cpu", {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("bf16", "cpu", {"avx512_bf16": False, "avx512_f": True}, torch.float32),
        ("bf16", "cpu", {"architecture": "aarch64"}, torch.float32),
        ("fp16", "cpu", {"avx512_bf16": True}, torch.float32),
    ],
)
def test_a_processor_takes_the_launchs_precision_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, processor: dict[str, Any], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert compute_dtype(precision, device) is expected


def test_the_user_of_a_processor_is_told_of_bfloat16() -> None:
    cpu = torch.device("cpu")
    (line,) = describe_precision(torch.bfloat16, cpu)
    assert "--mixed_precision no for float32" in line
    assert not describe_precision(torch.float32, cpu)
    assert not describe_precision(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(("asked", "given"), [("bf16", "bf16"), ("fp16", "no"), ("no", "no")])
def test_a_launch_on_a_processor_keeps_bf16(monkeypatch: pytest.MonkeyPatch, asked: str, given: str) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    monkeypatch.setattr(launch, "has_accelerator", lambda: False)
    made: dict[str, Any] = {}
    monkeypatch.setattr(launch, "Accelerator", lambda **kwargs: made.update(kwargs) or SimpleNamespace(num_processes=1))
    make_accelerator()
    assert made["mixed_precision"] == given


def test_the_precision_of_the_launch_is_what_the_configuration_says() -> None:
    assert precision_of_launch({}) is None
    assert precision_of_launch({"ACCELERATE_MIXED_PRECISION": "fp16"}) == "fp16"


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
    assert loss_scale(torch.bfloat16, whole=True) == 1
    for whole in (False, True):
        assert torch.tensor(loss_scale(torch.float16, whole=whole)).frexp().mantissa == 0.5
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "^distributed_type='DEEPSPEED': DeepSpeed adds up gradients itself"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "^dynamo_backend='INDUCTOR': per-example gradients are recorded"),
    ],
)
def test_a_launch_that_would_be_ignored_is_refused(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_launch({"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"})
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument, match=message):
        make_accelerator()
