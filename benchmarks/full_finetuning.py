"""Time and peak memory of a private step that trains every parameter, compared with no privacy and with Opacus.

    python -m benchmarks.full_finetuning --shape gpt2-small --threads 2 --output benchmarks/results/NAME.md
    python -m benchmarks.full_finetuning --shape gpt2-half --block 128 --accumulate 4 --rounds 5

A step is --accumulate micro-batches of --batch examples of --block tokens, then clipping, noise and AdamW where they
apply. Private steps usually have many micro-batches, which share the work done once per step (noise for every
parameter). So one micro-batch per step is the worst case.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from statistics import median

import torch

from benchmarks import models, tables
from benchmarks.arguments import FullFinetuningArguments
from benchmarks.contenders import PLAIN, PRIVATE
from benchmarks.largest_batch import PeakLine, largest_ratio, measure_lines, section
from benchmarks.peers import PLAIN_LOOP
from benchmarks.rounds import Result, compare
from benchmarks.settings import fixed, set_threads
from utils.cli.flags import exit_on_invalid_argument, parse

REFERENCES = (PLAIN, PLAIN_LOOP)
# Private over not private. Seconds are judged at {tokens per example: micro-batches per step}.
GOAL_SECONDS, GOAL_SECONDS_AT = 1.10, {128: 4, 512: 1}
GOAL_MEMORY = 1.05
GOAL_BATCH = 0.95


def main(args: FullFinetuningArguments) -> None:
    """Measure every block with every number of micro-batches; print the result and write it to --output."""
    set_threads(args)
    parts = [f"# Full fine-tuning, one step: {args.model or args.shape}, {args.dtype}"]
    parts.append(tables.machine("benchmarks.full_finetuning", torch.device(args.device), sys.argv[1:]))
    parts.append(about(args))
    goals: list[list[str]] = []
    for block in args.block:
        for accumulate in args.accumulate:
            result = compare(args, fixed(args.batch, block, accumulate), args.contenders)
            parts.append(result.markdown(describe(args, block, accumulate)))
            goals += goals_of(result, args.batch, block, accumulate)
            tables.save(parts, args.output)  # the rest may take hours
        if args.largest_batch:
            lines = measure_lines(args, block)
            parts.append(section(lines, block, args.limit_gib))
            goals.append(goal_of_batch(lines, block, args.limit_gib))
    tables.publish([*parts, goals_section(goals)], args.output)


def about(args: FullFinetuningArguments) -> str:
    """What is trained."""
    device = torch.device("meta" if args.model is None else "cpu")  # moved to meta, a saved model's weights are untied
    model = models.load(args.model, args.shape, dtype=args.dtype, device=device)
    head, count = model.get_output_embeddings().weight, sum(parameter.numel() for parameter in model.parameters())
    text = f"Every parameter is trained: {count / 1e6:.1f} million, by AdamW. "
    if head is not model.get_input_embeddings().weight:
        return text + "The output layer has its own weight."
    return text + (
        "The output layer is tied to the embedding, except for Opacus, whose ghost clipping supports no tied weights: "
        f"there it has its own weight ({(count + head.numel()) / 1e6:.1f} million in all), so its update differs."
    )


def describe(args: FullFinetuningArguments, block: int, accumulate: int) -> str:
    """Heading, and one sentence on the table."""
    return (
        f"## T={block}: {accumulate} x {args.batch} x {block} tokens per step\n\n"
        "Two contenders at a time; medians, with minimum and maximum in brackets."
    )


def goals_of(result: Result, batch: int, block: int, accumulate: int) -> list[list[str]]:
    """Rows of the table of goals: seconds and, if measured, memory."""
    setting = f"T={block}, {accumulate} x {batch}"
    seconds: dict[str, float | None] = {}
    memory: dict[str, float | None] = {}
    if result.subject == PRIVATE:
        seconds = {name: median(pair.ratios) for name, pair in result.pairs.items() if pair.is_whole}
        own = result.memory.get(PRIVATE)
        memory = {name: own.needed / its.needed for name, its in result.memory.items()} if own else {}
    goal = GOAL_SECONDS if GOAL_SECONDS_AT.get(block) == accumulate else None
    rows = [_row(f"seconds, {setting}", seconds, at_most=goal)]
    return rows + ([_row(f"memory, {setting}", memory, at_most=GOAL_MEMORY)] if result.memory else [])


def goal_of_batch(lines: Mapping[str, PeakLine], block: int, limit_gib: float) -> list[str]:
    """The row of the largest batch."""
    found = {name: largest_ratio(lines, name, limit_gib * 2**30) for name in REFERENCES}
    return _row(f"largest micro-batch, T={block}", found, at_least=GOAL_BATCH)


def goals_section(rows: list[list[str]]) -> str:
    """The table of goals and results."""
    header = ["private over not private", "goal", *(f"over {name}" for name in REFERENCES)]
    return "## Goals\n\n" + tables.markdown(header, rows)


def _row(
    label: str, found: Mapping[str, float | None], *, at_most: float | None = None, at_least: float | None = None
) -> list[str]:
    goal = f"at most {at_most}" if at_most else f"at least {at_least}" if at_least else "none"
    cells = []
    for name in REFERENCES:
        value = found.get(name)
        if value is None:
            cells.append("not measured")
            continue
        missed = (at_most is not None and value > at_most) or (at_least is not None and value < at_least)
        verdict = "" if goal == "none" else ": missed" if missed else ": reached"
        cells.append(f"{value:.3f}{verdict}")
    return [label, goal, *cells]


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(FullFinetuningArguments, description=__doc__))
