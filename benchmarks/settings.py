"""From arguments to what is run: the job of a setting, its draws, its contenders."""

from __future__ import annotations

import torch

from benchmarks import lengths, models, peers
from benchmarks.arguments import BenchmarkArguments
from benchmarks.contenders import PLAIN, PRIVATE, Contender, Job, Ours
from benchmarks.measure import Memory, memory_of

_MEMORY_STEPS = 2  # the optimizer's state is there from the second on


def set_threads(args: BenchmarkArguments) -> None:
    """Use --threads CPU threads in this process."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def job_of(args: BenchmarkArguments, setting: str) -> Job:
    """Model and sizes of one setting."""
    device, fixed = torch.device(args.device), setting == "fixed"
    return Job(
        base=models.load(args.model, args.shape, dtype=args.dtype, device=device),
        device=device,
        batch=args.batch,
        block=args.block if fixed else args.ragged_block,
        examples=args.batch * args.accumulate if fixed else args.draw,
        rank=args.rank,
        gradient_ckpt=args.gradient_ckpt,
    )


def draws_of(args: BenchmarkArguments, setting: str, job: Job, count: int) -> list[lengths.Draw]:
    """The steps of one setting, the same for every contender and in every process."""
    return lengths.draws(
        [(0, job.block)] if setting == "fixed" else _real_lengths(args),
        count,
        examples=job.examples,
        block=job.block,
        vocabulary=job.base.config.vocab_size,
    )


def _real_lengths(args: BenchmarkArguments) -> list[lengths.Length]:
    if args.text is None:
        return lengths.table(args.lengths)
    from transformers import AutoTokenizer

    return lengths.measured(args.text, AutoTokenizer.from_pretrained(args.model))


def make(name: str, job: Job) -> Contender:
    """The contender of that name."""
    return Ours(job, private=name == PRIVATE) if name in (PRIVATE, PLAIN) else peers.make(name, job)


def measure_memory(args: BenchmarkArguments, setting: str, name: str) -> Memory:
    """Memory of one contender; for a process of its own."""
    set_threads(args)
    job = job_of(args, setting)
    contender = make(name, job)
    try:
        return memory_of(contender, draws_of(args, setting, job, _MEMORY_STEPS), job.device)
    finally:
        contender.close()
