"""Time and peak memory of one DP-LoRA step, compared with the same step without privacy, PEFT and Opacus.

    python -m benchmarks.step --model .demo/SmolLM2-135M --threads 2 --output benchmarks/results/NAME.md
    python -m benchmarks.step --shape llama-1b --dtype bfloat16 --block 512 --accumulate 8 --setting fixed

There are two settings. `fixed`: a step of --accumulate batches of --batch examples of --block tokens. `ragged`: a step
of --draw examples whose lengths come from real text; dptune deals them by a token budget, the other libraries take
batches as from a DataLoader.
"""

from __future__ import annotations

import sys
from statistics import median

import torch

from benchmarks import tables
from benchmarks.arguments import BenchmarkArguments
from benchmarks.contenders import PLAIN, PRIVATE
from benchmarks.peers import PEFT
from benchmarks.rounds import Result, compare
from benchmarks.settings import set_threads, setting_of
from utils.cli.flags import exit_on_invalid_argument, parse

# Seconds of the private step over another contender's: 1.05 and 1.25 times PEFT's tokens per second.
GOALS = {PLAIN: {"fixed": 1.02, "ragged": 1.02}, PEFT: {"fixed": 1 / 1.05, "ragged": 1 / 1.25}}


def main(args: BenchmarkArguments) -> None:
    """Measure every setting; print the result and write it to --output."""
    set_threads(args)
    parts = [f"# One step of DP-LoRA: {args.model or args.shape}, {args.dtype}"]
    parts.append(tables.machine("benchmarks.step", torch.device(args.device), sys.argv[1:]))
    for setting in args.settings:
        parts.append(run_setting(args, setting))
    tables.publish(parts, args.output)


def run_setting(args: BenchmarkArguments, setting: str) -> str:
    """Measure one setting; returns Markdown."""
    result = compare(args, setting_of(args, setting), args.contenders)
    counts = [count for pair in result.pairs.values() for count in pair.tokens]
    return "\n\n".join([result.markdown(describe(args, setting, counts)), *goals_of(result, setting)])


def goals_of(result: Result, setting: str) -> list[str]:
    """One line per goal that was measured."""
    found = []
    for name, goals in GOALS.items():
        if result.subject == PRIVATE and name in result.pairs:
            ratio, goal = median(result.pairs[name].ratios), goals[setting]
            verdict = "reached" if ratio <= goal else "missed"
            found.append(f"Goal beside {name}: seconds at most {goal:.3f} of its. {ratio:.3f}: {verdict}.")
    return found


def describe(args: BenchmarkArguments, setting: str, counts: list[int]) -> str:
    """Heading, and one sentence on the step."""
    rounds = "Two contenders at a time; medians, with minimum and maximum in brackets"
    if setting == "fixed":
        batches = f"{args.accumulate} x " if args.accumulate > 1 else ""
        return f"## Fixed: {batches}{args.batch} x {args.block} tokens per step, all labelled\n\n{rounds}."
    source = args.text or f"`{args.lengths}` of benchmarks/lengths.json"
    mean, budget = sum(counts) / len(counts), args.batch * args.ragged_block
    return (
        f"## Ragged: {args.draw} examples per step, lengths from {source} cut at {args.ragged_block}\n\n"
        f"{mean:.0f} tokens per step on average, without padding. dptune takes at most {budget} padded tokens per "
        f"forward pass, the others {args.batch} examples. {rounds}."
    )


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(BenchmarkArguments, description=__doc__))
