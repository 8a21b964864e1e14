"""Time to the first step and peak memory of train_clm.py as the number of rows grows.

    python -m benchmarks.rows --rows 1000000 10000000 --output benchmarks/results/rows_HARDWARE_DATE.md

Rows are made up, short, and in a JSONL file. The model is tiny, so that what is measured is the data. Each run is a
process of its own: two private steps of 64 rows on average. Bytes per row are what a run takes more than one of
`--baseline` rows, for each row that it has more. Memory is looked at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MIB = 1 << 20
_PAUSE = 0.1  # seconds between two looks


@dataclass
class Watched:
    """What a run's processes took, in bytes.

    Attributes:
        own: the most that the run's process held, pages of mapped files included.
        private: of that what is its own, which the system cannot take back.
        workers: the most that its worker processes held together.
        disk: the most that the files of tokenised rows held.
    """

    own: int = 0
    private: int = 0
    workers: int = 0
    disk: int = 0

    def look(self, process: int, output: Path) -> None:
        """Look once."""
        own = _memory(process)
        self.own, self.private = max(self.own, own["VmHWM"]), max(self.private, own["RssAnon"])
        self.workers = max(self.workers, sum(_memory(child)["VmRSS"] for child in _children(process)))
        self.disk = max(self.disk, sum(_size(path) for path in output.glob(".rows-*/*")))


@dataclass
class Run:
    """One run: its rows, what it took, seconds until its first step was released and in all, and what it spent."""

    rows: int
    watched: Watched = field(default_factory=Watched)
    first_step: float = 0.0
    seconds: float = 0.0
    privacy: str = ""


def main() -> None:
    """Measure a run of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="numbers of rows")
    parser.add_argument("--baseline", type=int, default=1000, help="rows of the run that others are compared with")
    parser.add_argument("--output", help="file for the table; default: print it only")
    args = parser.parse_args()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        model = _model(Path(folder) / "model")
        for count in [args.baseline, *args.rows]:
            runs.append(_run(model, Path(folder), count))
            print(runs[-1], file=sys.stderr, flush=True)
            _publish(runs, args.output)


def _model(folder: Path) -> Path:
    from tests.tiny import save_tiny

    return save_tiny(folder)


def _write_rows(path: Path, count: int) -> Path:
    """Made-up rows of 17 to 37 tokens."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            answer = "word " * (1 + row % 5) + "end"
            file.write(json.dumps({"instruction": f"Repeat the word number {row % 97}.", "answer": answer}) + "\n")
    return path


def _run(model: Path, folder: Path, count: int) -> Run:
    """One launch on so many rows."""
    rows, output = _write_rows(folder / f"{count}.jsonl", count), folder / f"run {count}"
    command = [sys.executable, "train_clm.py", "--model_name_or_path", str(model), "--train_file", str(rows)]
    command += ["--output_dir", str(output), "--block_size", "64", "--per_device_train_batch_size", "8"]
    command += ["--gradient_accumulation_steps", "8", "--max_train_steps", "2", "--noise_multiplier", "1"]
    command += ["--delta", "1e-8", "--clip_norm", "1", "--lora_target_modules", "q_proj", "--checkpointing_steps", "0"]
    found, start = Run(count), time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_PAUSE):
            found.watched.look(process.pid, output)
            if not found.first_step and _size(output / "ledger.jsonl"):
                found.first_step = time.perf_counter() - start

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate()[0]
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"train_clm.py ended with {process.returncode}")
    found.seconds = time.perf_counter() - start
    found.privacy = re.findall(r"epsilon [0-9.e-]+ at delta [0-9.e-]+", printed)[-1]
    rows.unlink()
    return found


def _memory(process: int) -> dict[str, int]:
    """Bytes from the system's account of a process; 0 when it has ended."""
    found = {"VmHWM": 0, "VmRSS": 0, "RssAnon": 0}
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return found
    for name, _, value in (line.partition(":") for line in lines):
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found


def _children(process: int) -> list[int]:
    """The processes that a process has started and that run programs of their own already."""
    try:
        found = [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [child for child in found if _command(child) != _command(process)]


def _command(process: int) -> bytes:
    """The command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _size(path: Path) -> int:
    """Bytes of a file; 0 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _publish(runs: list[Run], output: str | None) -> None:
    import torch

    from benchmarks import tables

    least = runs[0]
    header = ["rows", "first step [s]", "process [MiB]", "of that private", "workers together [MiB]", "on disk [MiB]"]
    header += ["bytes a row: process", "private", "disk", "spent"]
    rows = []
    for run in runs:
        taken = [getattr(run.watched, name) for name in ("own", "private", "workers", "disk")]
        more = run.rows - least.rows
        growths = [getattr(run.watched, name) - getattr(least.watched, name) for name in ("own", "private", "disk")]
        each = [f"{growth / more:.1f}" if more else "" for growth in growths]
        sizes = [f"{one / _MIB:.0f}" for one in taken]
        rows.append([f"{run.rows:,}", f"{run.first_step:.0f}", *sizes, *each, run.privacy])
    machine = tables.machine("benchmarks.rows", torch.device("cpu"), sys.argv[1:])
    title = "# Rows: time to the first step and peak memory of train_clm.py"
    tables.publish([title, machine, tables.markdown(header, rows)], output)


if __name__ == "__main__":
    main()
