"""Results as Markdown: one table per setting, and the machine."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks import devices
from benchmarks.contenders import PLAIN
from benchmarks.measure import Memory
from benchmarks.peers import OWN_LOSS

_LIBRARIES = ("torch", "transformers", "peft", "opacus")
_MIB = 1 << 20


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratios round by round, so that both have the same draw and the same load of the machine."""
    return [own / other for own, other in zip(seconds, reference, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, with minimum and maximum in brackets."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(seconds: dict[str, list[float]], tokens: Sequence[int], memory: dict[str, Memory]) -> str:
    """One row per contender: tokens/s, seconds, and ratios of seconds and peak memory to those without privacy."""
    references = [name for name in (PLAIN, *OWN_LOSS) if name in seconds]
    header = ["contender", "tokens/s", *(f"seconds over {name}" for name in references), "seconds"]
    if memory:
        header += ["peak MiB", "of that in steps", "all but Python", *(f"that over {name}" for name in references)]
    rows = []
    for name, own in seconds.items():
        row = [name, spread([count / taken for count, taken in zip(tokens, own, strict=True)], 0)]
        row += [spread(ratios(own, seconds[reference]), 2) for reference in references]
        row.append(spread(own, 2))
        if memory:
            row += _memory_cells(memory[name], [memory[reference] for reference in references])
        rows.append(row)
    return markdown(header, rows)


def _memory_cells(own: Memory, references: Sequence[Memory]) -> list[str]:
    in_mib = [f"{size / _MIB:.0f}" for size in (own.peak, own.peak - own.before, own.needed)]
    return in_mib + [f"{own.needed / reference.needed:.2f}" for reference in references]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(parts: Sequence[str], output: str | None) -> None:
    """Print a result and save it."""
    save(parts, output)
    print("\n\n".join(parts) + "\n")


def save(parts: Sequence[str], output: str | None) -> None:
    """Write the result so far, if `output` names a file."""
    result = "\n\n".join(parts) + "\n"
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(result, encoding="utf-8")


def machine(program: str, device: torch.device, command: Sequence[str]) -> str:
    """Lines on command, date, hardware, versions and load of a run of `program` (a module)."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = {
        "command": f"`{shlex.join(['python', '-m', program, *command])}`",
        "date": date.today().isoformat(),
        "hardware": devices.describe(device),
        "versions": ", ".join(f"{name} {found}" for name in _LIBRARIES if (found := _version(name))),
        "load average at the start": f"{load} on {os.cpu_count()} cores",
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
