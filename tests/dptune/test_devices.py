"""Random numbers are restored and memory is pinned by the device's own kind, and no code names one vendor's; see also
`tests/pretend/`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dptune.devices import can_pin, computes_apart, has_accelerator, restored_randomness

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_cpus_random_numbers_are_restored(device: torch.device | None) -> None:
    before = torch.get_rng_state()
    with restored_randomness(device):
        torch.manual_seed(1)
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), inside)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
@pytest.mark.parametrize("given", [True, False])
def test_a_devices_own_random_numbers_are_restored(kind: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without such a device here, one number stands in for its kind's state."""
    states, device = {kind: 5}, torch.device(kind)

    def keep(state: int, _device: object) -> None:
        states[kind] = state

    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda _: states[kind])
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", keep)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    with restored_randomness(device if given else None):
        states[kind] = 6
    assert states[kind] == 5


@pytest.mark.parametrize(
    ("found", "has"), [(None, False), ("cuda", True), ("xpu", True), ("privateuseone", True), ("mps", False)]
)
def test_which_accelerators_can_train(found: str | None, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs have no float64."""
    device = found and torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    assert has_accelerator() is has


@pytest.mark.parametrize(("kind", "pins"), [("cuda", True), ("xpu", True), ("cpu", False), ("mps", False)])
def test_which_devices_copy_from_pinned_memory(kind: str, pins: bool) -> None:
    assert can_pin(torch.device(kind)) is pins


@pytest.mark.parametrize(("kind", "apart"), [("cuda", True), ("mps", True), ("cpu", False), ("meta", False)])
def test_which_devices_leave_the_cpu_free(kind: str, apart: bool) -> None:
    assert computes_apart(torch.device(kind)) is apart


# What names one vendor's device: its module, moving a tensor to it, its kind.
_ONE_VENDOR = re.compile(r"torch\.(?:backends\.)?cuda\b|\.cuda\(|[\"']cuda\b")
# These set and read how that backend multiplies, which each backend's own switches decide.
_BACKENDS = {"dptune/per_example/precision.py", "dptune/integrations/checks.py"}

# This names a kind for a device that a plan is for: every known one has it, AMD's too, and nothing is computed there.
_STANDS_FOR_ANOTHER = {"utils/training/target.py"}


def names_one_vendor(source: str) -> bool:
    """Whether code would work, or be different, on one vendor's devices only."""
    return _ONE_VENDOR.search(source) is not None


def test_no_code_names_one_vendors_device() -> None:
    folders = ("dptune", "utils", "scripts", "benchmarks")
    files = [path for folder in folders for kind in ("py", "sh") for path in ROOT.glob(f"{folder}/**/*.{kind}")]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.py"), *files]}
    assert {"train_clm.py", "benchmarks/run_gpu.sh", "utils/models/memory.py"} <= sources.keys()
    assert {name for name, source in sources.items() if names_one_vendor(source)} == _BACKENDS | _STANDS_FOR_ANOTHER


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.cuda.synchronize()", True),
        ("torch.backends.cuda.matmul", True),
        ("tensor.cuda()", True),
        ('if device.type == "cuda":', True),
        ("torch.device('cuda:0')", True),
        ("device.startswith('cuda')", True),
        ("torch.accelerator.synchronize(device)", False),
        ("torch.get_device_module(device)", False),
        ('{"CUDA": torch.version.cuda}', False),
        ("# a GPU of any vendor (cuda, xpu)", False),
    ],
)
def test_what_names_one_vendor(source: str, found: bool) -> None:
    assert names_one_vendor(source) is found
