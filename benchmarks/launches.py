"""Trains, resumes and samples with the programs that users launch, on models with random weights.

    python -m benchmarks.launches --shapes llama-1b llama-7b --output benchmarks/results/NAME.md

For each shape a checkpoint is written and train_clm.py takes --steps private steps. The first shape is then resumed for
--more_steps, and inference_generation_dataset.py samples from its adapter. Nothing is downloaded: weights are random,
the tokenizer and the rows are made up. The programs take the machine's accelerator if there is one.

A launch that fails stops only those that need its files. The exit status is 1 if any failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks import devices, tables
from benchmarks.models import DTYPES, SHAPES, TARGETS
from dptune._validate import require_count
from dptune.accounting.rounding import rounded_up
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.data.prompts import PUBMED_PROMPT
from utils.files.jsonl import write_jsonl
from utils.training.log import read_diagnostics

ROOT = Path(__file__).resolve().parents[1]
LLAMAS = [name for name, config in SHAPES.items() if config["model_type"] == "llama"]
_CONFIG = "accelerate_configs/accelerate_config_nofsdp.cfg"
_MIB = 1 << 20
_LOG_LINES = 20
_SENTENCE = "the patients were given a placebo and blood pressure was measured twice in each of two groups"


@dataclass
class LaunchArguments:
    """What is launched."""

    _argument_group_name = "benchmark"

    shapes: list[str] = field(
        default_factory=lambda: ["llama-1b", "llama-7b"], metadata={"help": "shapes of the models", "choices": LLAMAS}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of the checkpoints", "choices": list(DTYPES)})
    block: int = field(default=512, metadata={"help": "maximum tokens per row, and per sampled text"})
    batch: int = field(default=4, metadata={"help": "rows per forward pass"})
    accumulate: int = field(default=8, metadata={"help": "forward passes per step, on average"})
    rows: int = field(default=512, metadata={"help": "rows to train on"})
    steps: int = field(default=3, metadata={"help": "private steps"})
    more_steps: int = field(default=2, metadata={"help": "private steps after the first shape is resumed"})
    texts: int = field(default=8, metadata={"help": "texts to sample from the adapter of the first shape"})
    output: str | None = field(default=None, metadata={"help": "Markdown file for the result; default: only print"})

    def __post_init__(self) -> None:
        for name in ("block", "batch", "accumulate", "rows", "steps", "more_steps", "texts"):
            require_count(f"--{name}", getattr(self, name))


@dataclass(frozen=True)
class Figures:
    """What a launch left in its files; empty where it leaves none."""

    seconds_per_step: str = ""
    epsilon: str = ""
    found: str = ""


@dataclass(frozen=True)
class Outcome:
    """One launch: how it ended, what it measured, and the end of what it printed."""

    name: str
    failure: str | None
    seconds: float
    peak: int | None
    figures: Figures
    log: str

    @property
    def row(self) -> list[str]:
        """Its row of the table."""
        peak = "" if self.peak is None else f"{self.peak / _MIB:.0f}"
        figures = [self.figures.seconds_per_step, peak, self.figures.epsilon, self.figures.found]
        return [self.name, self.failure or "ok", f"{self.seconds:.1f}", *figures]


class Launches:
    """The launches of one benchmark, with their files in `folder`."""

    def __init__(self, args: LaunchArguments, folder: Path) -> None:
        self._args, self._folder = args, folder
        self._rows, self._peak = folder / "rows.jsonl", folder / "peak.txt"
        write_jsonl(self._rows, made_up_rows(args.rows, args.block))

    def of_shape(self, shape: str, *, also_resume: bool) -> Iterator[Outcome]:
        """Every launch of one shape; the model and its run are deleted at the end."""
        model, run = self._folder / shape, self._folder / f"{shape}-run"
        try:
            yield (made := self._write(shape, model))
            if made.failure is None:
                yield (trained := self._train(f"{shape}: train", model, run, self._args.steps))
                if also_resume and trained.failure is None:
                    steps = self._args.steps + self._args.more_steps
                    resume = ["--resume_from_checkpoint", "latest"]
                    yield self._train(f"{shape}: resume", model, run, steps, *resume)
                    yield self._sample(f"{shape}: sample", model, run)
        finally:
            for path in (model, run):
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, shape: str, model: Path) -> Outcome:
        flags = ["--shape", shape, "--dtype", self._args.dtype, "--output_dir", str(model)]

        def figures() -> Figures:
            size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
            return Figures(found=f"{size / _MIB:.1f} MiB of weights")

        return self._run(f"{shape}: write the checkpoint", ["-m", "benchmarks.random_checkpoint", *flags], figures)

    def _train(self, name: str, model: Path, run: Path, steps: int, *more: str) -> Outcome:
        sizes = {
            "block_size": self._args.block,
            "per_device_train_batch_size": self._args.batch,
            "gradient_accumulation_steps": self._args.accumulate,
            "max_train_steps": steps,
            "checkpointing_steps": 1,
        }
        privacy = {"clip_norm": 1, "noise_multiplier": 1, "delta": 1e-5, "learning_rate": 3e-4, "lora_r": 16}
        files = {"model_name_or_path": model, "train_file": self._rows, "output_dir": run}
        flags = [word for flag, value in (files | sizes | privacy).items() for word in (f"--{flag}", str(value))]
        flags += ["--lora_target_modules", *TARGETS, *more]

        def figures() -> Figures:
            taken = [row for row in read_diagnostics(run / "diagnostics.jsonl") if row["step"] > 0]
            if len(taken) != steps:
                raise ValueError(f"{len(taken)} steps in diagnostics.jsonl, not {steps}")
            report = json.loads((run / "publish" / "privacy_report.json").read_text())
            seconds = ", ".join(f"{row['seconds']:.2f}" for row in taken)
            return Figures(seconds, rounded_up(report["epsilon"]), f"{report['steps']} steps in the ledger")

        return self._launch(name, ["train_clm.py", *flags], figures)

    def _sample(self, name: str, model: Path, run: Path) -> Outcome:
        texts, output = self._args.texts, run / "generations"
        flags = ["--dataset_name", "pubmed_generation", "--num_samples", str(texts)]
        flags += ["--model_name_or_path", str(model), "--lora_weights_path", str(run / "publish")]
        flags += ["--max_length", str(self._args.block), "--output_dir", str(output)]

        def figures() -> Figures:
            lines = (output / "generations.jsonl").read_text(encoding="utf-8").splitlines()
            if len(lines) != texts:
                raise ValueError(f"{len(lines)} texts in generations.jsonl, not {texts}")
            letters = sum(len(json.loads(line)["text"]) for line in lines)
            return Figures(found=f"{texts} texts, {letters} characters")

        return self._launch(name, ["inference_generation_dataset.py", *flags], figures)

    def _launch(self, name: str, words: Sequence[str], figures: Callable[[], Figures]) -> Outcome:
        """Launch a program as the README does, in a process that writes its peak memory."""
        launcher = ["-m", "accelerate.commands.launch", "--config_file", _CONFIG]
        return self._run(name, [*launcher, "--module", "benchmarks.peak_memory", str(self._peak), *words], figures)

    def _run(self, name: str, words: Sequence[str], figures: Callable[[], Figures]) -> Outcome:
        print(f"{name} ...", file=sys.stderr, flush=True)
        self._peak.unlink(missing_ok=True)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        began = time.perf_counter()
        run = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        seconds = time.perf_counter() - began
        found, failure = Figures(), f"failed with status {run.returncode}" if run.returncode else None
        if failure is None:
            try:
                found = figures()
            except (OSError, ValueError, KeyError) as error:
                failure = f"failed: {type(error).__name__}: {error}"
        peak = int(self._peak.read_text()) if self._peak.exists() else None
        log = end_of(self._without_paths(run.stdout.decode(errors="replace")))
        outcome = Outcome(name, failure, seconds, peak, found, log)
        print(f"{name}: {failure or 'ok'}, {seconds:.1f} s", file=sys.stderr, flush=True)
        if failure is not None:
            print(log, file=sys.stderr, flush=True)
        return outcome

    def _without_paths(self, printed: str) -> str:
        """What was printed, without paths that exist on this machine only: results are committed."""
        for path, name in ((self._folder, "FOLDER"), (sys.prefix, "ENVIRONMENT"), (ROOT, "REPOSITORY")):
            printed = printed.replace(str(path), name)
        return printed


def made_up_rows(count: int, block: int) -> Iterator[dict[str, object]]:
    """Rows whose answers, in bytes, are between a quarter of `block` and a little over it."""
    chance = np.random.default_rng(0)
    for size in chance.integers(block // 4, block + block // 8, count, endpoint=True):
        words = chance.choice(_SENTENCE.split(), int(size) // 2)
        yield {"instruction": PUBMED_PROMPT, "answer": " ".join(words)[: int(size)]}


def end_of(printed: str) -> str:
    """The last lines of what a launch printed; of a progress bar only how it ended."""
    lines = [line.rstrip().rsplit("\r", maxsplit=1)[-1] for line in printed.split("\n")]
    return "\n".join([line for line in lines if line][-_LOG_LINES:])


def markdown(args: LaunchArguments, outcomes: Sequence[Outcome]) -> list[str]:
    """The parts of the result: the machine, the table, the end of each log."""
    header = ["launch", "result", "seconds", "seconds of each step", "peak MiB", "epsilon", "found"]
    return [
        f"# Launches on random weights: {', '.join(args.shapes)}",
        tables.machine("benchmarks.launches", torch.device(devices.choose("auto")), sys.argv[1:]),
        f"A step has {args.batch * args.accumulate} of {args.rows} rows on average, of at most {args.block} tokens. "
        "Seconds of a launch include loading. Peaks are of allocated bytes on an accelerator, of resident ones on a "
        "CPU.",
        tables.markdown(header, [outcome.row for outcome in outcomes]),
        *(f"## {outcome.name}\n\n```\n{outcome.log}\n```" for outcome in outcomes if outcome.log),
    ]


def main(args: LaunchArguments) -> int:
    """Launch everything, print the result and write it to --output. Returns the exit status."""
    outcomes: list[Outcome] = []
    with TemporaryDirectory() as folder:
        launches = Launches(args, Path(folder))
        for number, shape in enumerate(args.shapes):
            for outcome in launches.of_shape(shape, also_resume=number == 0):
                outcomes.append(outcome)
                tables.save(markdown(args, outcomes), args.output)  # whatever becomes of the next
    tables.publish(markdown(args, outcomes), args.output)
    return int(any(outcome.failure is not None for outcome in outcomes))


if __name__ == "__main__":
    with exit_on_invalid_argument():
        sys.exit(main(*parse(LaunchArguments, description=__doc__)))
