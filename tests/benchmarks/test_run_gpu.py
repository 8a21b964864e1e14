"""run_gpu.sh, on the CPU with tiny shapes: every part runs, and one that fails stops no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import devices
from benchmarks.contenders import PLAIN
from tests.benchmarks.comparing import rows_of

ROOT = Path(__file__).parents[2]
NOTHING = {"LAUNCH_SHAPES": "", "SHAPES": "", "FULL_SHAPES": ""}
TINY = {"DEVICE": "cpu", "DTYPE": "float32", "BLOCK": "8", "DRAW": "4", "ROUNDS": "1", "OMP_NUM_THREADS": "1"}
FULL = {"FULL_FLAGS": "--block 8 --no_memory --no_largest_batch", "FULL_CONTENDERS": "plain"}


def run_gpu(output: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    """Run the script with only the parts whose shapes are given."""
    environment = os.environ | NOTHING | TINY | {"PYTHON": sys.executable, "OUTPUT_DIR": str(output)} | changed
    command = ["bash", str(ROOT / "benchmarks" / "run_gpu.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_trains_resumes_and_samples(tmp_path: Path) -> None:
    flags = "--block 32 --batch 2 --accumulate 2 --rows 20 --steps 2 --more_steps 1 --texts 2"
    run = run_gpu(tmp_path, LAUNCH_SHAPES="tiny", LAUNCH_FLAGS=flags)
    assert run.returncode == 0, run.stdout + run.stderr
    (written,) = tmp_path.glob("launches_cpu_*.md")
    rows = rows_of(written.read_text())
    assert [rows[f"tiny: {name}"][0] for name in ("train", "resume", "sample")] == ["ok"] * 3
    train, resume = rows["tiny: train"], rows["tiny: resume"]
    assert [len(cells[2].split(", ")) for cells in (train, resume)] == [2, 3]
    assert 0 < float(train[4]) < float(resume[4]), "epsilon grows with the steps"
    assert int(train[3]) > 100
    assert rows["tiny: sample"][-1].startswith("2 texts, ")
    assert re.search(r"^== launches: status 0, \d+ s", run.stdout, flags=re.MULTILINE)


def test_it_measures_lora_steps(tmp_path: Path) -> None:
    run = run_gpu(tmp_path, SHAPES="tiny", CONTENDERS="plain")
    assert run.returncode == 0, run.stderr
    fixed, ragged = sorted(tmp_path.glob("step_cpu_tiny_*.md"))
    assert "| peak memory | MiB |" in fixed.read_text()
    assert "## Ragged: 4 examples" in ragged.read_text()


def test_a_part_that_fails_is_named_and_stops_no_other(tmp_path: Path) -> None:
    run = run_gpu(tmp_path, LAUNCH_SHAPES="nobody", FULL_SHAPES="gpt2-tiny", **FULL)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == "== launches: failed with status 2"
    (written,) = tmp_path.glob("full_finetuning_cpu_gpt2-tiny_*.md")
    assert PLAIN in rows_of(written.read_text())
    assert "seconds, T=8, 4 x 8" in written.read_text()


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"SECONDS_IN_ALL": "0"}, "== full fine-tuning, gpt2-tiny: not run, no time was left"),
        ({"PART_SECONDS": "1"}, "== full fine-tuning, gpt2-tiny: ended after 1 s"),
    ],
)
def test_time_is_kept(limits: dict[str, str], told: str, tmp_path: Path) -> None:
    run = run_gpu(tmp_path, FULL_SHAPES="gpt2-tiny", **FULL, **limits)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == told


@pytest.mark.skipif(devices.choose("auto") != "cpu", reason="this machine has an accelerator")
def test_no_cpu_is_taken_by_mistake(tmp_path: Path) -> None:
    run = run_gpu(tmp_path, DEVICE="accelerator")
    assert run.returncode != 0
    assert "torch sees no accelerator here; give cpu" in run.stderr
