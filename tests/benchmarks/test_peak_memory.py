"""A program runs as it would alone, and its peak memory is written even if it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
held = bytearray(300 << 20)
for place in range(0, len(held), 4096):
    held[place] = 1
print(__name__, sys.argv[1:])
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_the_peak_and_the_status_of_a_program(status: int, tmp_path: Path) -> None:
    program, peak = tmp_path / "program.py", tmp_path / "peak.txt"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "benchmarks.peak_memory", str(peak), str(program), "--flag", str(status)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stderr
    assert run.stdout == f"__main__ ['--flag', '{status}']\n"
    assert int(peak.read_text()) > 300 << 20
