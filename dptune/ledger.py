"""An append-only record of every noisy step, from which epsilon is computed.

A line is on disk before the gradient it stands for leaves the mechanism, so a crash can make the ledger count a step
that was never used, but not the other way round.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from dptune import accounting
from dptune._files import append_line
from dptune._validate import refuse
from dptune.accounting import Spend


class Ledger:
    """The steps recorded at `path`; opening a file that has entries counts them.

    Raises:
        InvalidArgument: a line that is no entry. A torn last line is dropped: its gradient was never used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._counts = _read(self.path)

    @property
    def steps(self) -> int:
        """Noisy steps recorded so far."""
        return sum(self._counts.values())

    @property
    def spends(self) -> list[Spend]:
        """The recorded steps, grouped by their settings, in order of first use."""
        return [Spend(sigma, q, count) for (sigma, q), count in self._counts.items()]

    def record(self, *, noise_multiplier: float, sampling_probability: float, clip_norm: float) -> None:
        """Append one step and wait until it is on disk."""
        entry = {
            "step": self.steps + 1,
            "noise_multiplier": noise_multiplier,
            "sampling_probability": sampling_probability,
            "clip_norm": clip_norm,
        }
        append_line(self.path, json.dumps(entry))
        self._counts[noise_multiplier, sampling_probability] += 1

    def epsilon(self, delta: float) -> float:
        """Epsilon of everything recorded, as the report states it."""
        return accounting.compose(self.spends, delta=delta)

    def running_epsilon(self, delta: float) -> float:
        """A slightly larger bound in milliseconds, for a progress bar."""
        return accounting.running_epsilon(self.spends, delta=delta)


def _settings(entry: dict[str, float], number: int) -> tuple[float, float]:
    """(noise multiplier, sampling probability) of the entry on line `number`; an error where it cannot be one."""
    sigma, q = float(entry["noise_multiplier"]), float(entry["sampling_probability"])
    if not (sigma > 0 and 0 < q <= 1 and entry["step"] == number):  # another step's number: lines are missing or double
        raise ValueError
    return sigma, q


def _read(path: Path) -> Counter[tuple[float, float]]:
    counts: Counter[tuple[float, float]] = Counter()
    if not path.exists():
        return counts
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            counts[_settings(json.loads(line), number)] += 1
        except (ValueError, KeyError, TypeError):
            refuse("ledger", f"{path}:{number}", "not a ledger entry; restore the file from the last good checkpoint")
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return counts
