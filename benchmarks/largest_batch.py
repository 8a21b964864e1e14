"""The largest micro-batch that fits in a memory limit, predicted from the peak memory of a few sizes.

Peak memory is linear in the batch: weights, gradients and optimizer state are constant, and each example adds its
activations. It is not linear for small batches, where the optimizer's own peak is higher. The line is fitted by least
squares; the largest deviation from it is reported with the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor

import numpy as np

from benchmarks import tables
from benchmarks.arguments import FullFinetuningArguments
from benchmarks.contenders import PLAIN, PRIVATE
from benchmarks.measure import in_fresh_process
from benchmarks.peers import PLAIN_LOOP
from benchmarks.settings import fixed, measure_memory

COMPARED = (PRIVATE, PLAIN, PLAIN_LOOP)
_MIB = 1 << 20


@dataclass(frozen=True)
class PeakLine:
    """Peak bytes by examples per micro-batch: `fixed + per_example * batch`. `off` is the largest deviation of a
    measured peak, as a share of the peak."""

    peaks: Mapping[int, int]
    fixed: float
    per_example: float
    off: float

    def largest(self, limit: float) -> int | None:
        """The largest batch whose peak is within `limit` bytes; None if memory did not grow with the batch."""
        return max(0, floor((limit - self.fixed) / self.per_example)) if self.per_example > 0 else None


def fit(peaks: Mapping[int, int]) -> PeakLine:
    """The line fitted to {batch: bytes}, with at least two batches."""
    batches, measured = np.array(list(peaks), dtype=float), np.array(list(peaks.values()), dtype=float)
    per_example, constant = np.polyfit(batches, measured, 1)
    off = np.abs(constant + per_example * batches - measured) / measured
    return PeakLine(peaks, float(constant), float(per_example), float(off.max()))


def measure_lines(args: FullFinetuningArguments, block: int) -> dict[str, PeakLine]:
    """The line of each compared contender: two micro-batches per step, each measured in its own process."""
    names = [args.names[key] for key in args.contenders]
    return {
        name: fit(
            {
                batch: in_fresh_process(measure_memory, args, fixed(batch, block, 2), name).needed
                for batch in args.batches_of(block)
            }
        )
        for name in COMPARED
        if name in names
    }


def largest_ratio(lines: Mapping[str, PeakLine], reference: str, limit: float) -> float | None:
    """The largest batch of private training divided by that of `reference`; None unless both are known."""
    if PRIVATE not in lines or reference not in lines:
        return None
    own, other = (lines[name].largest(limit) for name in (PRIVATE, reference))
    return own / other if own is not None and other else None


def section(lines: Mapping[str, PeakLine], block: int, limit_gib: float) -> str:
    """Heading, explanation and table."""
    batches = list(next(iter(lines.values())).peaks) if lines else []
    header = ["contender", *(f"MiB at {batch}" for batch in batches), "fixed MiB", "MiB per example", "deviation"]
    header.append(f"largest within {limit_gib:g} GiB")
    rows = []
    for name, line in lines.items():
        measured = [f"{peak / _MIB:.0f}" for peak in line.peaks.values()]
        largest = line.largest(limit_gib * 2**30)
        known = "unknown: memory did not grow" if largest is None else str(largest)
        parts = [f"{line.fixed / _MIB:.0f}", f"{line.per_example / _MIB:.1f}", f"{line.off:.1%}", known]
        rows.append([name, *measured, *parts])
    return (
        f"## Largest micro-batch of {block} tokens within {limit_gib:g} GiB\n\n"
        "Predicted, not run: a line in the batch size is fitted to the measured peak memory. Steps of two "
        "micro-batches; Python and its libraries are not counted.\n\n" + tables.markdown(header, rows)
    )
