"""Starts the tests on the pretend accelerator in a process of their own, because torch forgets no device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tests_on_the_pretend_accelerator_pass() -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/pretend/test_*.py"))
    assert len(files) >= 4
    command = [sys.executable, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout[-6000:]}{run.stderr[-2000:]}"
    assert " passed" in run.stdout
