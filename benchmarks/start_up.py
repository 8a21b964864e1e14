"""Processor seconds from the launch of train_clm.py to its first step, by part.

    python -m benchmarks.start_up --model .demo/SmolLM2-135M --output benchmarks/results/start_up_HARDWARE_DATE.md

Every round is a fresh process, which stops where the first micro-batch would begin. With `--beside FOLDER`, another
checkout of the repository takes turns with this one; ratios are of the same round. Times are of the processor, so that
other jobs on the machine matter little: give one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
# Module and function -> the part that its time counts to. A part inside another one is taken out of that one.
_PARTS = {
    "utils.cli.launch.make_accelerator": "accelerator",
    "utils.training.causal_lm.skeleton.load_skeleton": "skeleton of the model",
    "utils.training.causal_lm.plan.load_tokenizer": "tokenizer",
    "utils.training.causal_lm.data.load_training_data": "reading and tokenising rows",
    "utils.training.causal_lm.plan.plan_run": "plan (noise for epsilon)",
    "utils.training.causal_lm.load.load_model": "loading weights",
    "utils.training.causal_lm.skeleton.prepare_trainable": "adapters",
    "utils.training.causal_lm.load.prepare_trainable": "adapters",
    "utils.training.causal_lm.load.check_rules": "checks on random rows",
}
_IMPORTS, _REST, _WHOLE = "imports", "the rest", "launch to first step"
_MEASURED = "DPTUNE_START_UP"  # marks the line of the result


class _FirstStep(BaseException):
    """Ends the program where the first step begins."""


def main() -> None:
    """Measure rounds, or be one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--rows", type=int, default=1000, help="rows of the training file")
    parser.add_argument("--block_size", type=int, default=128, help="maximum tokens per row")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each side")
    parser.add_argument("--beside", help="folder of another checkout, which takes turns with this one")
    parser.add_argument("--output", help="file for the table; default: print it only")
    args = parser.parse_args()
    sides = {"this version": ROOT} | ({"the other checkout": Path(args.beside)} if args.beside else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        rows = _write_rows(Path(folder) / "rows.jsonl", args.rows)
        for number in range(args.rounds):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                found[name].append(_launch(sides[name], args, rows, Path(folder) / f"{name} {number}"))
                print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    _publish(args, found)


def _write_rows(path: Path, count: int) -> Path:
    words = ["the", "patients", "were", "given", "a", "placebo", "and", "we", "report", "what", "changed"]
    texts = [
        " ".join(words[(row * 7 + place * 5) % len(words)] for place in range(20 + row % 60)) for row in range(count)
    ]
    lines = [json.dumps({"instruction": f"Report {row}", "answer": text}) for row, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _launch(root: Path, args: argparse.Namespace, rows: Path, output: Path) -> dict[str, float]:
    """Processor seconds by part of one launch in a fresh process."""
    given = ["--model_name_or_path", args.model, "--train_file", str(rows), "--output_dir", str(output)]
    given += ["--block_size", str(args.block_size), "--per_device_train_batch_size", "4", "--clip_norm", "1"]
    given += ["--gradient_accumulation_steps", "16", "--max_train_steps", "10", "--target_epsilon", "8"]
    given += ["--lora_target_modules", "q_proj", "v_proj"]
    code = f"import runpy, sys; sys.path.insert(0, {str(root)!r}); measure = runpy.run_path({__file__!r})['measure']; "
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}measure({given!r})"],
        cwd=root, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(_MEASURED))
    return dict(json.loads(line.removeprefix(_MEASURED)))


def measure(given: list[str]) -> None:
    """In the fresh process: run train_clm.py up to its first step, and print the seconds of each part."""
    import utils.cli.launch
    import utils.training.causal_lm.plan
    import utils.training.causal_lm.run  # noqa: F401  the programs import these
    from utils.training.loop import TrainingLoop
    from utils.training.run import open_folder  # noqa: F401  the programs import it

    program = runpy.run_path("train_clm.py")  # of the checkout that is the working folder
    seconds = {_IMPORTS: time.process_time()}
    for place, part in _PARTS.items():
        _count(place, part, seconds)

    def stop(*_: object, **__: object) -> None:
        raise _FirstStep

    TrainingLoop.train = stop  # type: ignore[assignment,method-assign]
    try:
        program["main"](given)
    except _FirstStep:
        whole = time.process_time()
    seconds[_REST] = whole - sum(seconds.values())
    print(f"\n{_MEASURED}{json.dumps(seconds | {_WHOLE: whole})}", flush=True)
    os._exit(0)


def _count(place: str, part: str, seconds: dict[str, float]) -> None:
    """Replace a function by one that adds its time to `part`."""
    module, _, name = place.rpartition(".")
    function = getattr(sys.modules[module], name)

    def timed(*args: object, **kwargs: object) -> object:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.process_time() - start

    setattr(sys.modules[module], name, timed)


def _publish(args: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    import torch

    from benchmarks import tables

    sides = list(found.values())
    header = ["part", *(f"{name} [s]" for name in found)] + (["ratio, median of rounds"] if len(sides) == 2 else [])
    rows = []
    for part in sides[0][0]:
        cells = [tables.spread([one[part] for one in side], 2) for side in sides]
        if len(sides) == 2:
            cells.append(f"{median(tables.ratios(*([one[part] for one in side] for side in sides))):.2f}")
        rows.append([part, *cells])
    title = f"# Start-up of train_clm.py: {Path(args.model).name}, {args.rows:,} rows, block size {args.block_size}"
    machine = tables.machine("benchmarks.start_up", torch.device("cpu"), sys.argv[1:])
    tables.publish([title, machine, tables.markdown(header, rows)], args.output)


if __name__ == "__main__":
    main()
