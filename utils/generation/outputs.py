"""Files written beside `generations.jsonl` once every text is done: instructions, a summary, AlpacaEval's format."""

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
class SamplingSpeed:
    """Tokens that a process generated, and the seconds that it took."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Counts of texts: `ended` = `blank` + `duplicates` + `kept`.

    Attributes:
        texts: how many were generated.
        ended: how many ended with an end token or stop string; the others were cut at the length limit.
        blank: ended texts that are empty or white space.
        duplicates: other ended texts that are identical to an earlier one.
        kept: the remaining ended texts.
        tokens_per_second: of all processes together in the last run; None if that run had nothing to generate.
    """

    texts: int
    ended: int
    blank: int
    duplicates: int
    kept: int
    tokens_per_second: float | None

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:.0f} tokens/s"
        counts = f": {self.blank} blank, {self.duplicates} copies of others, {self.kept} different ones"
        told = f"{self.ended} of {self.texts} texts ended before the length limit"
        return f"{told}{counts if self.ended else ', the others were cut there'}{speed}"


def write_sampling_outputs(path: Path, sampling: SamplingArguments, speeds: Sequence[SamplingSpeed]) -> Summary:
    """Write the summary and, if asked for, the instructions, beside `path`.

    Args:
        path: a finished `generations.jsonl`.
        sampling: says whether to write the instructions.
        speeds: the speed of each process.
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
    """Write the texts of `path` in AlpacaEval's format, in the order of the instructions.

    The format is that of `model_outputs` in https://github.com/tatsu-lab/alpaca_eval.

    Args:
        path: a finished `generations.jsonl`, with one text per instruction.
        instructions: the instructions.
        generator: the model's name in AlpacaEval.
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


def _together(speeds: Sequence[SamplingSpeed]) -> float | None:
    """Tokens of all processes per second of the slowest; None if there are no tokens."""
    tokens = sum(speed.tokens for speed in speeds)
    return round(tokens / max(speed.seconds for speed in speeds), 1) if tokens else None


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
