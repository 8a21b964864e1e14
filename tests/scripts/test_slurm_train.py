"""The Slurm recipe, with stand-ins for Slurm's commands and for accelerate: what it launches, and when it requeues."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# On each of two machines srun runs its command; accelerate notes its flags and does what the test says. scontrol takes
# its time between two names: who reads but the first must not end it, and the job with it, by a broken pipe.
STAND_INS = {
    "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@" || exit $?; done',
    "scontrol": 'if [ "$1" = show ]; then echo alpha; sleep 0.2; echo beta; else echo "$@" >>"$NOTES/requeued"; fi',
    "accelerate": 'printf "%s\\n" "$*" >>"$NOTES/launched"; eval "$WORK"',
}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    for name, body in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    (tmp_path / "out dir").mkdir()
    return tmp_path


def submit(notes: Path, work: str) -> subprocess.CompletedProcess[str]:
    slurm = {"SLURM_JOB_NODELIST": "[alpha,beta]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17"}
    environment = {**os.environ, **slurm, "PATH": f"{notes / 'bin'}:{os.environ['PATH']}", "NOTES": str(notes)}
    out = notes / "out dir"
    return subprocess.run(
        ["bash", "scripts/slurm_train.sh", "--train_file", "my data.json", "--output_dir", str(out)],
        cwd=ROOT,
        env={**environment, "WORK": work, "OUT": str(out), "SLURM_SUBMIT_DIR": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_machine_is_launched_with_its_number_and_all_processes(notes: Path) -> None:
    assert submit(notes, "true").returncode == 0
    first, second = (notes / "launched").read_text().splitlines()
    assert second == first.replace("--machine_rank 0", "--machine_rank 1")
    for part in (
        "--config_file accelerate_configs/accelerate_config_two_machines.cfg",
        "--num_machines 2 --num_processes 8 --machine_rank 0 --main_process_ip alpha",
        "train_clm.py --resume_from_checkpoint latest --train_file my data.json",
        str(notes / "out dir"),
    ):
        assert part in first
    assert (ROOT / "accelerate_configs" / "accelerate_config_two_machines.cfg").is_file()


def test_a_run_that_got_somewhere_and_did_not_finish_is_queued_again(notes: Path) -> None:
    assert submit(notes, 'echo line >>"$OUT/ledger.jsonl"; exit 1').returncode == 1
    assert (notes / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize(
    "work",
    ["exit 2", 'echo line >>"$OUT/ledger.jsonl"; mkdir -p "$OUT/publish"; touch "$OUT/publish/privacy_report.json"'],
    ids=["mistake", "finished"],
)
def test_a_mistake_or_a_finished_run_is_not(notes: Path, work: str) -> None:
    submit(notes, work)
    assert not (notes / "requeued").exists()
