"""Time and peak memory of one DP-LoRA step against the same step without privacy, PEFT and Opacus.

    python -m benchmarks.step --model .demo/SmolLM2-135M --threads 2 --output benchmarks/results/NAME.md
    python -m benchmarks.step --shape llama-1b --dtype bfloat16 --block 512 --accumulate 8 --setting fixed

Two settings: `fixed` is --accumulate batches of --batch examples of --block tokens a step; `ragged` is a logical step
of --draw examples whose lengths come from real text, where our step deals by a budget of tokens and the peers take
batches as a DataLoader gives them.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from benchmarks import peers, tables
from benchmarks.arguments import CONTENDERS, BenchmarkArguments
from benchmarks.contenders import Contender, Job
from benchmarks.lengths import Draw, tokens
from benchmarks.measure import alternate, in_fresh_process
from benchmarks.settings import draws_of, job_of, make, measure_memory, set_threads
from utils.arguments import exit_on_invalid_argument, parse

Times = dict[str, list[float]]


def main(args: BenchmarkArguments) -> None:
    """Measure every setting; print the result and write it to --output."""
    set_threads(args)
    parts = [f"# One step of DP-LoRA: {args.model or args.shape}, {args.dtype}"]
    parts.append(tables.machine(torch.device(args.device), sys.argv[1:]))
    for setting in args.settings:
        parts.append(run_setting(args, setting))
    result = "\n\n".join(parts) + "\n"
    print(result)
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(result, encoding="utf-8")


def run_setting(args: BenchmarkArguments, setting: str) -> str:
    """Measure one setting; Markdown."""
    seconds, counts, left_out = time_setting(args, setting)
    memory = {}
    if args.memory:
        memory = {name: in_fresh_process(measure_memory, args, setting, name) for name in seconds}
    notes = [f"Left out: {name}: {why}." for name, why in left_out.items()]
    return "\n\n".join([describe(args, setting, counts), tables.table(seconds, counts, memory), *notes])


def time_setting(args: BenchmarkArguments, setting: str) -> tuple[Times, list[int], dict[str, str]]:
    """(seconds of each contender's rounds, tokens of each round, who was left out and why)."""
    job = job_of(args, setting)
    draws = draws_of(args, setting, job, args.warmup + args.rounds)
    contenders, left_out = gather_contenders(args, job, draws[0][: args.batch])
    try:
        seconds = alternate(contenders, draws, warmup=args.warmup, device=job.device, max_seconds=args.max_seconds)
    finally:
        for contender in contenders:
            contender.close()
    rounds = len(next(iter(seconds.values())))
    del job, contenders  # memory is measured next, in other processes: leave the device to them
    gc.collect()
    torch.cuda.empty_cache()
    return seconds, [tokens(draw) for draw in draws[args.warmup :][:rounds]], left_out


def gather_contenders(args: BenchmarkArguments, job: Job, trial: Draw) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that did a trial step, and the reasons why others are left out. A failure of ours is raised."""
    found: list[Contender] = []
    left_out: dict[str, str] = {}
    for name in (CONTENDERS[key] for key in args.contenders):
        if lacking := peers.missing(name):
            left_out[name] = f"not installed: {', '.join(lacking)}"
            continue
        try:
            contender = make(name, job)
            contender.step(trial)
        except Exception as error:  # whatever a peer does not support here: the others are measured all the same
            if name not in peers.NEEDS:
                raise
            reason = next(iter(str(error).splitlines()), "")
            left_out[name] = f"failed with {type(error).__name__}: {reason[:200]}"
            continue
        found.append(contender)
    return found, left_out


def describe(args: BenchmarkArguments, setting: str, counts: list[int]) -> str:
    """Heading and one sentence on what a step was."""
    rounds = f"{len(counts)} rounds; medians, least and most in brackets"
    if setting == "fixed":
        batches = f"{args.accumulate} x " if args.accumulate > 1 else ""
        return f"## Fixed: {batches}{args.batch} x {args.block} tokens a step, all labelled\n\n{rounds}."
    source = args.text or f"`{args.lengths}` of benchmarks/lengths.json"
    mean, budget = sum(counts) / len(counts), args.batch * args.ragged_block
    return (
        f"## Ragged: {args.draw} examples a step, lengths from {source} cut at {args.ragged_block}\n\n"
        f"{mean:.0f} tokens a step on average, padding not counted. Ours takes at most {budget} padded tokens at a "
        f"time, the others {args.batch} examples. {rounds}."
    )


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(BenchmarkArguments, description=__doc__))
