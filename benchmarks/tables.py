"""Results as Markdown: one table per setting, and the machine."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from benchmarks import devices
from benchmarks.measure import Memory

_LIBRARIES = ("torch", "transformers", "peft", "opacus")
_MIB = 1 << 20


def ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Ratios round by round, so that both have the same draw and the same load of the machine."""
    return [own / other for own, other in zip(seconds, reference, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, with minimum and maximum in brackets."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def pairs(subject: str, measured: Sequence[tuple[Mapping[str, Sequence[float]], Sequence[int]]]) -> str:
    """One row per other contender: its and the subject's tokens/s and seconds, and the ratio of the seconds.

    Args:
        measured: (seconds of the subject and of another contender, tokens), round by round.
    """
    header = [f"{subject}, beside", "seconds over its", "tokens/s", "its tokens/s", "seconds", "its seconds", "rounds"]
    rows = []
    for seconds, tokens in measured:
        own = seconds[subject]
        ((name, its),) = [one for one in seconds.items() if one[0] != subject] or [(subject, own)]
        speeds = (spread([count / one for count, one in zip(tokens, taken, strict=True)], 0) for taken in (own, its))
        times = (spread(taken, 2) for taken in (own, its))
        rows.append([name, spread(ratios(own, its), 3), *speeds, *times, str(len(own))])
    return markdown(header, rows)


def memory(subject: str, measured: Mapping[str, Memory]) -> str:
    """One row per contender: its peak memory, and that of the subject over it."""
    header = ["peak memory", "MiB", "of that in steps", "all but Python", f"{subject}, over that"]
    rows = []
    for name, own in measured.items():
        in_mib = [f"{size / _MIB:.0f}" for size in (own.peak, own.peak - own.before, own.needed)]
        rows.append([name, *in_mib, f"{measured[subject].needed / own.needed:.3f}"])
    return markdown(header, rows)


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
