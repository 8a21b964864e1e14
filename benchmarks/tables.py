"""What was measured, as Markdown: one table a setting, and the machine it holds for."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks.contenders import PLAIN
from benchmarks.measure import Memory
from benchmarks.peers import PEFT

_LIBRARIES = ("torch", "transformers", "peft", "opacus")
_MIB = 1 << 20


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round: the draw and the machine's mood are then the same in both."""
    return [own / other for own, other in zip(seconds, reference, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Median with the least and the most."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(seconds: dict[str, list[float]], tokens: Sequence[int], memory: dict[str, Memory]) -> str:
    """One row a contender: tokens/s, seconds over ours and PEFT's without privacy, peak memory."""
    references = [name for name in (PLAIN, PEFT) if name in seconds]
    header = ["contender", "tokens/s", *(f"seconds over {name}" for name in references)]
    rows = [header + (["peak MiB", "of that in steps"] if memory else []), []]
    for name, own in seconds.items():
        row = [name, spread([count / taken for count, taken in zip(tokens, own, strict=True)], 0)]
        row += [spread(ratios(own, seconds[reference]), 2) for reference in references]
        if memory:
            peak = memory[name]
            row += [f"{peak.peak / _MIB:.0f}", f"{(peak.peak - peak.before) / _MIB:.0f}"]
        rows.append(row)
    rows[1] = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machine(device: torch.device, command: Sequence[str]) -> str:
    """The lines that a result cannot be judged without."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = {
        "command": f"`{shlex.join(['python', '-m', 'benchmarks.step', *command])}`",
        "date": date.today().isoformat(),
        "hardware": _gpu(device) if device.type == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads used",
        "versions": ", ".join(f"{name} {found}" for name in _LIBRARIES if (found := _version(name))),
        "load average at the start": f"{load} on {os.cpu_count()} cores",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _cpu() -> str:
    """The processor's name as the kernel gives it, with the cores seen here."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
