"""A benchmark's device is the machine's own accelerator, of any vendor, or the CPU."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks import devices, measure
from benchmarks.lengths import Draw
from dptune import InvalidArgument

GIB = 1 << 30
META = torch.device("meta")  # stands for an accelerator here: its tensors hold nothing


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str | None:
    """The machine has an accelerator of this kind, or none."""
    found = request.param and torch.device(request.param)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
    return request.param


@pytest.mark.parametrize(
    ("accelerator", "name", "chosen"),
    [
        (None, "auto", "cpu"),
        (None, "cpu", "cpu"),
        ("cuda", "auto", "cuda"),
        ("cuda", "accelerator", "cuda"),
        ("cuda", "cuda:1", "cuda:1"),
        ("cuda", "cpu", "cpu"),
        ("xpu", "auto", "xpu"),
        ("xpu", "accelerator", "xpu"),
        ("mps", "auto", "cpu"),  # Apple's has no float64, in which gradients are added
    ],
    indirect=["accelerator"],
)
@pytest.mark.usefixtures("accelerator")
def test_the_device_is_the_machines_own(name: str, chosen: str) -> None:
    assert devices.choose(name) == chosen


@pytest.mark.parametrize(
    ("accelerator", "name", "remedy"),
    [
        (None, "cuda", "torch sees no accelerator here; give cpu"),
        (None, "accelerator", "torch sees no accelerator here; give cpu"),
        ("mps", "mps", "torch sees no accelerator here; give cpu"),
        ("xpu", "cuda", "give auto, cpu or xpu"),
        ("cuda", "tpu", "give auto, cpu or cuda"),
    ],
    indirect=["accelerator"],
)
@pytest.mark.usefixtures("accelerator")
def test_a_device_that_is_not_there_is_refused(name: str, remedy: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"--device='{name}': {remedy}")):
        devices.choose(name)


@pytest.mark.parametrize("accelerator", ["cuda", "xpu"], indirect=True)
def test_an_accelerator_is_described_by_its_own_module(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = SimpleNamespace(get_device_name=lambda device: f"{device.type} of a vendor")
    monkeypatch.setattr(torch, "get_device_module", lambda _: vendor)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (3 * GIB, 7 * GIB))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.describe(torch.device(accelerator)).startswith(f"{accelerator} of a vendor, 7 GiB")
    assert "HIP 6.4" in devices.describe(torch.device(accelerator))
    assert devices.for_scripts("accelerator") == f"{accelerator} {accelerator}-of-a-vendor 7"


def test_a_cpu_is_described_by_the_kernel() -> None:
    assert re.fullmatch(r".+, \d+ cores, \d+ threads used", devices.describe(torch.device("cpu")))
    assert devices.for_scripts("cpu") == "cpu cpu 24"


class Idle:
    """A contender whose steps are empty."""

    name = "idle"

    def step(self, _: Draw) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def test_time_and_memory_of_any_accelerator_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    peaks = iter([5, 50])

    def note(name: str, value: object = None) -> object:
        asked.append(name)
        return value

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: note("synchronize"))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: note("empty_cache"))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda _: note("reset"))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda _: note("peak", next(peaks)))
    memory = measure.memory_of(Idle(), [[]], META)
    assert (memory.before, memory.peak) == (5, 50)
    assert asked == ["empty_cache", "reset", "peak", "synchronize", "peak"]
    asked.clear()
    measure.alternate([Idle()], [[]], warmup=0, device=META, max_seconds=1.0)
    assert asked == ["synchronize", "synchronize"], "a step's kernels are still running when it returns"
