"""One setting of a comparison: contenders, rounds, memory and table."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from benchmarks import peers, tables
from benchmarks.arguments import CommonArguments
from benchmarks.contenders import Contender, Job
from benchmarks.lengths import Draw, tokens
from benchmarks.measure import Memory, alternate, in_fresh_process
from benchmarks.settings import Setting, draws_of, job_of, make, measure_memory


@dataclass(frozen=True)
class Result:
    """The measurements of one setting.

    Attributes:
        seconds: of each contender's rounds.
        tokens: of each round.
        memory: of each contender; empty if not measured.
        left_out: contenders that did not take part -> the reason.
    """

    seconds: dict[str, list[float]]
    tokens: list[int]
    memory: dict[str, Memory]
    left_out: dict[str, str]

    def markdown(self, description: str) -> str:
        """The description and the table."""
        notes = [f"Left out: {name}: {why}." for name, why in self.left_out.items()]
        return "\n\n".join([description, tables.table(self.seconds, self.tokens, self.memory), *notes])


def compare(args: CommonArguments, setting: Setting, chosen: list[str]) -> Result:
    """Time the chosen contenders (keys of `args.names`) in turns, and measure the memory of each if asked for."""
    seconds, counts, left_out = time_rounds(args, setting, [args.names[key] for key in chosen])
    memory = {}
    if args.memory:
        memory = {name: in_fresh_process(measure_memory, args, setting, name) for name in seconds}
    return Result(seconds, counts, memory, left_out)


def time_rounds(
    args: CommonArguments, setting: Setting, names: list[str]
) -> tuple[dict[str, list[float]], list[int], dict[str, str]]:
    """(seconds of each contender's rounds, tokens of each round, contenders left out -> reason)."""
    job = job_of(args, setting)
    draws = draws_of(setting, job, args.warmup + args.rounds)
    contenders, left_out = gather_contenders(names, job, draws[0][: setting.batch])
    try:
        seconds = alternate(contenders, draws, warmup=args.warmup, device=job.device, max_seconds=args.max_seconds)
    finally:
        for contender in contenders:
            contender.close()
    rounds = len(next(iter(seconds.values())))
    del job, contenders  # free the device for the processes that measure memory next
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return seconds, [tokens(draw) for draw in draws[args.warmup :][:rounds]], left_out


def gather_contenders(names: list[str], job: Job, trial: Draw) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that passed a trial step, and why others are left out. A failure of dptune's own step is raised."""
    found: list[Contender] = []
    left_out: dict[str, str] = {}
    for name in names:
        if lacking := peers.missing(name):
            left_out[name] = f"not installed: {', '.join(lacking)}"
            continue
        try:
            contender = make(name, job)
            contender.step(trial)
        except Exception as error:  # a peer may fail in any way; the others are measured all the same
            if name not in peers.NEEDS:
                raise
            reason = next(iter(str(error).splitlines()), "")
            left_out[name] = f"failed with {type(error).__name__}: {reason[:200]}"
            continue
        found.append(contender)
    return found, left_out
