"""Runs a program as `python PROGRAM FLAGS` does, and writes the peak memory of its process to a file, in bytes.

    python -m benchmarks.peak_memory FILE PROGRAM FLAGS

Allocated bytes on an accelerator, resident bytes on a CPU. It is written even if the program fails.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

from benchmarks import devices
from benchmarks.measure import peak


def main(output: str, program: str, *flags: str) -> None:
    """Run `program` in this process, with `flags` as its command line."""
    sys.argv = [program, *flags]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        Path(output).write_text(str(peak(torch.device(devices.choose("auto")))))


if __name__ == "__main__":
    main(*sys.argv[1:])
