"""What is written beside `generations.jsonl` once every text is there: instructions, a summary, AlpacaEval's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dptune._files import atomic_write
from utils.data.instruction_files import Instruction
from utils.files.jsonl import write_jsonl
from utils.generation.arguments import SamplingArguments
from utils.generation.files import Generation, read_generations

INSTRUCTIONS_FILE = "instructions.jsonl"
SUMMARY_FILE = "summary.json"
ALPACA_EVAL_FILE = "alpaca_eval.json"


@dataclass(frozen=True)
class Speed:
    """What a process drew, in tokens, and how long it took, in seconds."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What became of the texts. Those that ended are the blank ones, the duplicates and those that are kept.

    Attributes:
        texts: how many were drawn.
        ended: by themselves; the others were cut at the length limit.
        blank: of those, white space at most.
        duplicates: of those that are not blank, equal to an earlier one of them to the letter.
        kept: the rest.
        tokens_per_second: of all processes together, in the run that finished; None if it had nothing left to draw.
    """

    texts: int
    ended: int
    blank: int
    duplicates: int
    kept: int
    tokens_per_second: float | None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.0f} tokens/s"
        counts = f"{self.ended} of {self.texts} texts ended by themselves, {self.blank} of them blank, "
        return f"{counts}{self.duplicates} duplicates, {self.kept} kept{speed}"


def write_sampling_outputs(path: Path, sampling: SamplingArguments, speeds: Sequence[Speed]) -> Summary:
    """Write the summary and, where it is asked for, the instructions, beside the texts of `path`.

    Args:
        path: a whole `generations.jsonl`.
        sampling: says whether the instructions are wanted.
        speeds: of every process.
    """
    rows = _in_order(path)
    ended = [row for row in rows if row["ended"]]
    texts = [row for row in ended if row["text"].strip()]
    first: dict[str, Generation] = {}
    for row in texts:
        first.setdefault(row["text"], row)
    kept = list(first.values())
    if sampling.deduplicate or sampling.prompt_style == "uncond_generation":
        instructions = ({"id": f"syn-{row['index']}", "instruction": row["text"]} for row in kept)
        write_jsonl(path.with_name(INSTRUCTIONS_FILE), instructions)
    counts = (len(rows), len(ended), len(ended) - len(texts), len(texts) - len(kept), len(kept))
    summary = Summary(*counts, _together(speeds))
    _write_json(path.with_name(SUMMARY_FILE), asdict(summary))
    return summary


def write_alpaca_eval(path: Path, instructions: Sequence[Instruction], generator: str) -> Path:
    """Write the texts of `path` as AlpacaEval reads a model's outputs, in the order of the instructions.

    The format is that of `model_outputs` in https://github.com/tatsu-lab/alpaca_eval.

    Args:
        path: a whole `generations.jsonl`, with one text for each instruction.
        instructions: what was asked.
        generator: the name under which AlpacaEval lists the model.
    """
    pairs = zip(instructions, _in_order(path), strict=True)
    outputs = [_alpaca_row(instruction, row, generator) for instruction, row in pairs]
    _write_json(path.with_name(ALPACA_EVAL_FILE), outputs)
    return path.with_name(ALPACA_EVAL_FILE)


def _alpaca_row(instruction: Instruction, row: Generation, generator: str) -> dict[str, str]:
    named = {} if instruction.dataset is None else {"dataset": instruction.dataset}
    return {"instruction": instruction.text, "output": row["text"], "generator": generator, **named}


def _in_order(path: Path) -> list[Generation]:
    rows = read_generations(path.parent)
    return [rows[index] for index in sorted(rows)]


def _together(speeds: Sequence[Speed]) -> float | None:
    """Tokens of all processes by the time of the slowest; None without a token."""
    tokens = sum(speed.tokens for speed in speeds)
    return round(tokens / max(speed.seconds for speed in speeds), 1) if tokens else None


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
