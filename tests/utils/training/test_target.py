"""The devices of a plan: those of the launch, or the named ones with the launch's precision."""

from __future__ import annotations

import pytest
import torch

from dptune.pass_overhead import pass_overhead
from utils.cli.launch import make_accelerator
from utils.models.known_devices import find_device
from utils.training import target as target_module
from utils.training.planning_arguments import PlanningArguments
from utils.training.target import Target, target_of, target_without_launch

CPU = torch.device("cpu")


def planned(monkeypatch: pytest.MonkeyPatch, precision: str | None, device: str, devices: int | None = None) -> Target:
    monkeypatch.setattr(target_module, "precision_of_launch", lambda: precision)
    return target_of(PlanningArguments(for_device=device, for_devices=devices), make_accelerator())


def test_without_a_named_device_it_is_that_of_the_launch() -> None:
    accelerator = make_accelerator()
    found = target_of(PlanningArguments(), accelerator)
    assert (found.device, found.processes, found.named) == (accelerator.device, accelerator.num_processes, None)
    assert Target(CPU, 1, torch.float32, None).describe(sharded=False) == []
    (line,) = Target(CPU, 1, torch.bfloat16, None).describe(sharded=False)
    assert "which this processor multiplies faster" in line


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)]
)
def test_a_named_device_has_the_precision_of_the_launch_on_every_machine(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(monkeypatch, precision, "H100")
    assert (found.dtype, found.memory, found.processes) == (dtype, 81_559 << 20, 1)
    assert found.overhead(sharded=True) == pass_overhead(accelerator=True, sharded=True)
    devices, told = found.describe(sharded=False)
    assert devices == "planned for            1 x H100 80GB (79.65 GiB), with all weights"
    assert told == f"precision              {str(dtype)[6:]}: mixed_precision {precision} of the launch configuration"


def test_without_a_launch_configuration_it_is_float32_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch, None, "24GB", 8)
    assert (found.dtype, found.processes) == (torch.float32, 8)
    devices, told = found.describe(sharded=True)
    assert devices == "planned for            8 x 24GB (22.35 GiB), weights sharded over them"
    assert "float32, without a launch configuration; accelerate_configs/accelerate_config_nofsdp.cfg has bf16" in told


@pytest.mark.parametrize(("precision", "is_told"), [("bf16", True), ("fp16", False)])
def test_a_device_without_bfloat16_is_told(precision: str, is_told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = planned(monkeypatch, precision, "V100 16GB").describe(sharded=False)[-1]
    assert ("V100 16GB has no bfloat16: launch with --mixed_precision fp16" in told) is is_told


@pytest.mark.parametrize(
    ("device", "dtype", "memory"),
    [("H100", torch.bfloat16, 81_559 << 20), ("T4", torch.float16, 15_360 << 20), (None, torch.float32, None)],
)
def test_without_a_launch_a_device_computes_in_half_precision_and_a_processor_in_float32(
    device: str | None, dtype: torch.dtype, memory: int | None
) -> None:
    found = target_without_launch(None if device is None else find_device(device), 2)
    assert (found.dtype, found.memory, found.processes) == (dtype, memory, 2)
    assert (found.device == CPU) is (device is None)
