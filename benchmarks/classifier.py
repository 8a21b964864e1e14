"""Time of a private step divided by the same step without privacy, for each fine-tuning mode of `train_classifier.py`.

    python -m benchmarks.classifier --threads 2 --output benchmarks/results/NAME.md
    python -m benchmarks.classifier --model PATH --modes full lora --block 64 --batch 64 --accumulate 4

A step is --accumulate micro-batches of --batch rows of --block tokens, then clipping, noise and AdamW where they apply.
"""

from __future__ import annotations

import copy
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig

from benchmarks import devices, tables
from benchmarks.contenders import PLAIN, PRIVATE, adamw
from benchmarks.measure import alternate
from dptune import Ledger, PlainStep, PrivacyConfig, PrivateStep, trainable_parameters
from dptune._validate import require_count, require_positive
from dptune.integrations.peft import class_logits
from utils.classification.mode_defaults import MODES
from utils.classification.modes import prepare_mode
from utils.cli.flags import exit_on_invalid_argument, parse

CLASSES = 2
CLIP_NORM = 1.0  # does not affect speed
GOALS = {"full": 1.25}
GOAL = 1.10  # for every other mode
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {},
}

Draw = list[dict[str, Tensor]]  # micro-batches


@dataclass
class ClassifierArguments:
    """What to measure."""

    _argument_group_name = "benchmark"

    model: str | None = field(default=None, metadata={"help": "folder of a classifier or encoder; default: --shape"})
    shape: str = field(default="minilm", metadata={"help": "shape, with random weights", "choices": list(SHAPES)})
    modes: list[str] = field(default_factory=lambda: list(MODES), metadata={"help": "modes", "choices": list(MODES)})
    batch: int = field(default=32, metadata={"help": "rows per forward pass"})
    block: int = field(default=32, metadata={"help": "tokens per row"})
    accumulate: int = field(default=8, metadata={"help": "micro-batches per step"})
    rounds: int = field(default=7, metadata={"help": "measured steps, taken in turns with and without privacy"})
    max_seconds: float = field(default=120.0, metadata={"help": "seconds after which a mode starts no more rounds"})
    device: str = field(default="cpu", metadata={"help": "device: auto, cpu, or the accelerator's kind (cuda, xpu)"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; default: torch decides"})
    output: str | None = field(default=None, metadata={"help": "Markdown file for the result; default: only print"})

    def __post_init__(self) -> None:
        for name in ("batch", "block", "accumulate", "rounds"):
            require_count(f"--{name}", getattr(self, name))
        require_positive("--max_seconds", self.max_seconds)
        self.device = devices.choose(self.device)


class Classifier:
    """One fine-tuning mode, private or not."""

    def __init__(self, base: Any, mode: str, args: ClassifierArguments, *, private: bool) -> None:
        self.name = PRIVATE if private else PLAIN
        prepared, _ = prepare_mode(copy.deepcopy(base), mode)
        self._model = prepared.to(args.device).train()
        self._optimizer = adamw(trainable_parameters(self._model))
        self._open = ExitStack()
        rows = args.batch * args.accumulate
        if private:
            folder = Path(self._open.enter_context(TemporaryDirectory()))
            self._step: PrivateStep | PlainStep = PrivateStep(
                self._model, _config(rows), ledger=Ledger(folder / "ledger.jsonl")
            )
        else:
            self._step = PlainStep(self._model, rows)
        self._open.enter_context(self._step)

    @property
    def trained(self) -> int:
        """Number of trained parameters, also available outside the step's `with` block."""
        return sum(p.numel() for group in self._optimizer.param_groups for p in group["params"])

    def step(self, draw: Draw) -> None:
        """One logical step."""
        for part in draw:
            inputs = {name: value for name, value in part.items() if name != "labels"}
            logits = class_logits(self._model, inputs)
            self._step.backward(F.cross_entropy(logits, part["labels"], reduction="none"))
        self._step.finish()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """Release threads and files."""
        self._open.close()


def _config(rows: int) -> PrivacyConfig:
    return PrivacyConfig(
        num_examples=max(67_349, rows),  # the size of SST-2; does not affect speed
        expected_batch_size=rows,
        steps=1000,
        clip_norm=CLIP_NORM,
        noise_multiplier=1.0,
        delta=1e-6,
    )


def load(args: ClassifierArguments) -> Any:
    """The classifier that every mode starts from, with the dropout of its configuration."""
    torch.manual_seed(0)
    if args.model is not None:
        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=CLASSES, local_files_only=True)
    return AutoModelForSequenceClassification.from_config(BertConfig(**SHAPES[args.shape], num_labels=CLASSES))


def draws(args: ClassifierArguments, vocabulary: int) -> list[Draw]:
    """One draw per round and one to warm up, the same with and without privacy."""
    generator = torch.Generator().manual_seed(0)

    def part() -> dict[str, Tensor]:
        ids = torch.randint(5, vocabulary, (args.batch, args.block), generator=generator)
        labels = torch.randint(CLASSES, (args.batch,), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: value.to(args.device) for name, value in found.items()}

    return [[part() for _ in range(args.accumulate)] for _ in range(args.rounds + 1)]


def row_of(args: ClassifierArguments, base: Any, mode: str) -> list[str]:
    """The table row of one mode."""
    contenders = [Classifier(base, mode, args, private=private) for private in (True, False)]
    rounds = draws(args, base.config.vocab_size)
    try:
        seconds = alternate(
            contenders, rounds, warmup=1, device=torch.device(args.device), max_seconds=args.max_seconds
        )
    finally:
        for contender in contenders:
            contender.close()
    found = tables.ratios(seconds[PRIVATE], seconds[PLAIN])
    goal = GOALS.get(mode, GOAL)
    verdict = "reached" if median(found) <= goal else "missed"
    trained = f"{contenders[0].trained:,}"
    own = [tables.spread(seconds[name], 2) for name in (PRIVATE, PLAIN)]
    return [mode, trained, *own, tables.spread(found, 3), f"at most {goal:.2f}: {verdict}", str(len(found))]


def main(args: ClassifierArguments) -> None:
    """Measure every mode; print the result and write it to --output."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    base = load(args)
    parts = [f"# One step of classification, private over not private: {args.model or args.shape}"]
    parts.append(tables.machine("benchmarks.classifier", torch.device(args.device), sys.argv[1:]))
    parts.append(f"{args.accumulate} x {args.batch} rows of {args.block} tokens per step; median (minimum to maximum).")
    header = ["mode", "trained", "seconds, private", "seconds, no privacy", "ratio", "goal", "rounds"]
    rows = []
    for mode in args.modes:
        rows.append(row_of(args, base, mode))
        tables.save([*parts, tables.markdown(header, rows)], args.output)
    tables.publish([*parts, tables.markdown(header, rows)], args.output)


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(ClassifierArguments, description=__doc__))
