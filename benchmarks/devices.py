"""The device that a benchmark runs on: chosen by name, and described for its result.

    python -m benchmarks.devices accelerator    # for scripts: its kind, its name in file names, GiB of its memory

Everything goes through `torch.accelerator`, so that devices of every vendor are measured by the same code.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from dptune._validate import refuse
from dptune.devices import has_accelerator
from utils.cli.flags import exit_on_invalid_argument

_CPU, _AUTO, _ACCELERATOR = "cpu", "auto", "accelerator"
_CPU_GIB = 24  # what --limit_gib takes by default


def choose(name: str) -> str:
    """The device of that name. `accelerator` is the one that the machine has, and `auto` is the CPU if it has none.

    Raises:
        InvalidArgument: this machine has no such device.
    """
    current = torch.accelerator.current_accelerator(check_available=True)
    found = current.type if current is not None and has_accelerator() else None
    if name == _AUTO or (name == _ACCELERATOR and found is not None):
        return found or _CPU
    if name.partition(":")[0] not in (_CPU, found):
        remedy = f"give auto, cpu or {found}" if found else "torch sees no accelerator here; give cpu"
        refuse("--device", name, remedy)
    return name


def name_of(device: torch.device) -> str:
    """The name that the vendor or the kernel gave it."""
    if device.type == _CPU:
        return _processor()
    module = torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else device.type


def total_memory(device: torch.device) -> int:
    """Bytes of an accelerator's memory."""
    return torch.accelerator.get_memory_info(device)[1]


def describe(device: torch.device) -> str:
    """One line: name, memory and platform of an accelerator; name, cores and threads of a CPU."""
    if device.type == _CPU:
        return f"{name_of(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    platforms = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "XPU": torch.version.xpu}
    versions = [f"{name} {version}" for name, version in platforms.items() if version is not None]
    return ", ".join([name_of(device), f"{total_memory(device) / 2**30:.0f} GiB", *versions])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def for_scripts(name: str) -> str:
    """Kind, name without spaces and GiB of the chosen device."""
    kind = choose(name)
    device = torch.device(kind)
    if device.type == _CPU:
        return f"{kind} {kind} {_CPU_GIB}"
    return f"{kind} {name_of(device).replace(' ', '-')} {total_memory(device) // 2**30}"


if __name__ == "__main__":
    with exit_on_invalid_argument():
        print(for_scripts(*sys.argv[1:]))
