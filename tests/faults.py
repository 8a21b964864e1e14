r"""Kill a real launch again and again, at random moments, resume it each time, and check that nothing was lost.

    python -m tests.faults --kills 30 --output benchmarks/results/faults_<hardware>_<date>.md
    python -m tests.faults --kills 12 --trainable all     # the model itself: shards of weights and optimizer states

A small model is fine-tuned on two processes with sharded weights. Each round waits for a random number of steps (some
rounds for none: the kill comes while the processes start, load or save), then kills one process or all with SIGKILL.
Last, a run under a test seed is killed once, and must end with the bits of one that nobody killed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor

from dptune.accounting.rounding import rounded_up
from dptune.ledger import Ledger
from dptune.run.checkpoint import find_checkpoint, load_checkpoint
from tests.tiny import save_tiny
from utils.training.log import read_diagnostics

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "accelerate_configs" / "accelerate_config.cfg"
DELTA = 1e-3
_MARK = "DPTUNE_FAULTS_LAUNCH"
_ENDS_WITHIN = 90.0  # seconds that survivors of a killed process may take


@dataclass
class Launch:
    """A run of train_clm.py in `out`, to be launched as often as it takes."""

    model: Path
    data: Path
    out: Path
    steps: int
    trainable: str | None = None  # see `--trainable`; None for adapters
    checkpointing_steps: int = 4
    extra: tuple[str, ...] = ()
    mark: str = field(default_factory=secrets.token_hex)  # in the environment of every process of it

    def start(self) -> subprocess.Popen[str]:
        """Begin or resume the run, with the same command line."""
        settings: dict[str, object] = {
            "model_name_or_path": self.model,
            "train_file": self.data,
            "output_dir": self.out,
            "block_size": 48,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_train_steps": self.steps,
            "learning_rate": 0.01,
            "clip_norm": 1,
            "noise_multiplier": 0.8,
            "delta": DELTA,
            **({"lora_r": 4} if self.trainable is None else {"trainable": self.trainable}),
            "checkpointing_steps": self.checkpointing_steps,
            "resume_from_checkpoint": "latest",
        }
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "train_clm.py"]
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out.parent / f"{self.out.name}.log", "a") as log:
            return subprocess.Popen(
                [*line, *flags, *self.extra],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", _MARK: self.mark},
                stdout=log,
                stderr=log,
                text=True,
            )

    def log(self) -> str:
        """What all launches printed."""
        return (self.out.parent / f"{self.out.name}.log").read_text()

    def ledger_lines(self) -> int:
        """Number of recorded noisy steps."""
        path = self.out / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def diagnostics(self) -> tuple[int, int]:
        """(when the file last changed, which a launch does as it begins; the last step whose update was logged)."""
        path = self.out / "diagnostics.jsonl"
        if not path.exists():
            return 0, 0
        return path.stat().st_ctime_ns, max((row["step"] for row in read_diagnostics(path)), default=0)

    def saved_step(self) -> int:
        """The step after which a resumed run starts. Each file of its checkpoint is compared with its hash."""
        found = find_checkpoint(self.out, "latest")
        if found is None:
            return 0
        saved = load_checkpoint(found)
        assert saved.ledger_steps <= self.ledger_lines(), "a checkpoint counts steps that the ledger lacks"
        return saved.step

    def weights(self) -> dict[str, Tensor]:
        """What the finished run has trained."""
        if self.trainable is None:
            return dict(torch.load(self.out / "publish" / "lora_weights.bin", weights_only=True))
        return load_file(self.out / "publish" / "model.safetensors")


@dataclass
class Kill:
    """One round."""

    target: str
    after_lines: int  # of the ledger
    applied: int  # updates applied in this round, as logged
    seconds: float  # from the kill to the end of the last process


@dataclass
class Result:
    """What happened in all rounds and the last, which ran to its end."""

    kills: list[Kill] = field(default_factory=list)
    applied: int = 0  # updates over all rounds
    ledger_lines: int = 0
    report: dict[str, object] = field(default_factory=dict)


def run_with_kills(launch: Launch, kills: int, *, seed: int) -> Result:
    """Launch, kill and resume, then let the run end; check every claim that can be checked on the way."""
    chance, result = random.Random(seed), Result()
    while len(result.kills) < kills:
        start, before, (former, _) = launch.saved_step(), launch.ledger_lines(), launch.diagnostics()
        most = max(1, min(launch.steps - start - 1, 2 * launch.checkpointing_steps))
        wanted = 0 if chance.random() < 0.2 else chance.randint(1, most)
        process = launch.start()
        _wait_for_steps(launch, process, before + wanted)
        time.sleep(chance.uniform(0, 8 if wanted == 0 else 0.5))
        target = chance.choice(["all", "one"])
        if process.poll() is not None:
            break  # it ended before the kill
        began = time.monotonic()
        target = _kill(launch, process, target, chance)
        process.wait(_ENDS_WITHIN)
        _require_gone(launch)
        changed, last = launch.diagnostics()
        applied = last - start if changed != former else 0  # killed before it began to train
        result.applied += applied
        result.kills.append(Kill(target, launch.ledger_lines(), applied, time.monotonic() - began))
        assert launch.ledger_lines() >= result.applied, "an update was applied that the ledger does not know"
    start = launch.saved_step()
    process = launch.start()
    assert process.wait(600) == 0, launch.log()[-3000:]
    result.applied += launch.steps - start
    result.ledger_lines = launch.ledger_lines()
    result.report = json.loads((launch.out / "publish" / "privacy_report.json").read_text())
    _check_end(launch, result)
    return result


def _check_end(launch: Launch, result: Result) -> None:
    ledger = Ledger(launch.out / "ledger.jsonl")
    assert ledger.steps >= result.applied >= launch.steps
    assert result.report["steps"] == ledger.steps
    assert result.report["repeated_steps"] == ledger.steps - launch.steps
    if result.report["guarantee"] == "dp":
        assert result.report["epsilon"] == ledger.epsilon(DELTA)
    assert all(value.isfinite().all() for value in launch.weights().values())


def require_same_bits(one: Launch, other: Launch) -> None:
    """Check that two finished runs have trained the same weights."""
    ours, theirs = one.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), f"{name} differs between {one.out.name} and {other.out.name}"


def _kill_once_under_test_seed(launch: Launch) -> None:
    """A short run like `launch`, killed once after some steps, ends with the bits of one that nobody killed."""
    seeded = ("--insecure_test_seed", "7")
    calm, killed = (
        replace(launch, out=launch.out.parent / name, steps=10, extra=seeded) for name in ("calm", "killed")
    )
    run_with_kills(calm, 0, seed=0)
    found = run_with_kills(killed, 1, seed=2)
    assert found.ledger_lines > killed.steps, "the kill lost no step: another seed is needed"
    require_same_bits(killed, calm)


def _wait_for_steps(launch: Launch, process: subprocess.Popen[str], lines: int) -> None:
    deadline = time.monotonic() + 240
    while launch.ledger_lines() < lines and process.poll() is None:
        assert time.monotonic() < deadline, f"no step in 240 s: {launch.log()[-2000:]}"
        time.sleep(0.02)


def _kill(launch: Launch, process: subprocess.Popen[str], target: str, chance: random.Random) -> str:
    """Send SIGKILL to every process of the launch or to one worker; returns which."""
    workers = [pid for pid in _processes(launch) if pid != process.pid]
    if target == "one" and workers:
        os.kill(chance.choice(workers), signal.SIGKILL)
        return "one worker"
    # The launcher first: it would end the workers more gently. Its workers do not die with it.
    for pid in [process.pid, *workers]:
        _kill_if_there(pid)
    return "all processes"


def _kill_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _processes(launch: Launch) -> list[int]:
    """The launcher and its workers, which have separate sessions (Linux)."""
    found, mark = [], f"{_MARK}={launch.mark}".encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or belongs to another user
    return found


def _require_gone(launch: Launch) -> None:
    """Wait until no process of the launch is left, because it would write into the next launch's folder."""
    deadline = time.monotonic() + _ENDS_WITHIN
    while left := _processes(launch):
        assert time.monotonic() < deadline, f"processes {left} outlived the launch"
        time.sleep(0.05)


def write_examples(path: Path) -> Path:
    """Training data that a tiny model can learn something from."""
    rows = [(f"Repeat the word number {i % 7}.", "word " * (1 + i % 5) + "end") for i in range(64)]
    path.write_text(json.dumps({"instruction": [row[0] for row in rows], "answer": [row[1] for row in rows]}))
    return path


def _table(result: Result, launch: Launch, seconds: float) -> str:
    rows = "\n".join(
        f"| {number} | {kill.target} | {kill.after_lines} | {kill.applied} | {kill.seconds:.1f} |"
        for number, kill in enumerate(result.kills, start=1)
    )
    sharded = "frozen weights sharded" if launch.trainable is None else "trained weights and optimizer states sharded"
    about = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return f"""# Kills and resumes

`python -m tests.faults {" ".join(sys.argv[1:])}`

{datetime.date.today()}, {about}, two processes (gloo), {sharded}, a tiny Llama,
{launch.steps} steps, a checkpoint every {launch.checkpointing_steps}.

{len(result.kills)} kills in {seconds / 60:.0f} minutes. The run ended with epsilon
{rounded_up(result.report["epsilon"])} over
{result.ledger_lines} noisy steps in the ledger, {result.report["repeated_steps"]} of them repeated.
Over all launches {result.applied} updates were applied.

Checked after every kill: the ledger has at least as many lines as updates were applied, no process outlives the
launch, and each file of the newest checkpoint has its hash. Checked at the end: the report's steps and epsilon are
the ledger's, what was trained loads and is finite. A run of 10 steps under a test seed, killed once, ended with the
bits of one that nobody killed.

| kill | of | ledger lines after it | updates applied in this launch | seconds until all processes were gone |
| ---: | --- | ---: | ---: | ---: |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainable", help="train the model's own parameters, see train_clm.py. Default: adapters")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        launch = Launch(
            save_tiny(Path(folder, "model")),
            write_examples(Path(folder, "data.json")),
            Path(folder, "run"),
            args.steps,
            args.trainable,
        )
        _kill_once_under_test_seed(launch)
        text = _table(run_with_kills(launch, args.kills, seed=args.seed), launch, time.monotonic() - began)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
