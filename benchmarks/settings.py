"""Turn arguments into a setting, its job, its draws and its contenders."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks import lengths, models, peers
from benchmarks.arguments import BenchmarkArguments, CommonArguments
from benchmarks.contenders import PLAIN, PRIVATE, Contender, Job, Ours
from benchmarks.lengths import Length
from benchmarks.measure import Memory, memory_now, memory_of


@dataclass(frozen=True)
class Setting:
    """The data of a logical step.

    Attributes:
        batch: examples per forward pass.
        block: maximum tokens per example.
        examples: examples per step.
        lengths: the lengths to draw from.
    """

    batch: int
    block: int
    examples: int
    lengths: tuple[Length, ...]


def fixed(batch: int, block: int, accumulate: int) -> Setting:
    """`accumulate` micro-batches of `batch` examples of `block` tokens, all labelled."""
    return Setting(batch, block, batch * accumulate, ((0, block),))


def setting_of(args: BenchmarkArguments, name: str) -> Setting:
    """The setting of that name, `fixed` or `ragged`."""
    if name == "fixed":
        return fixed(args.batch, args.block, args.accumulate)
    return Setting(args.batch, args.ragged_block, args.draw, tuple(_real_lengths(args)))


def set_threads(args: CommonArguments) -> None:
    """Use --threads CPU threads in this process."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def job_of(args: CommonArguments, setting: Setting) -> Job:
    """The model and sizes of one setting."""
    device = torch.device(args.device)
    return Job(
        base=models.load(args.model, args.shape, dtype=args.dtype, device=device),
        device=device,
        batch=setting.batch,
        block=setting.block,
        examples=setting.examples,
        rank=args.adapter_rank,
        gradient_ckpt=args.gradient_ckpt,
    )


def draws_of(setting: Setting, job: Job, count: int) -> list[lengths.Draw]:
    """The steps of one setting, the same for every contender and in every process."""
    return lengths.draws(
        setting.lengths, count, examples=setting.examples, block=setting.block, vocabulary=job.base.config.vocab_size
    )


def _real_lengths(args: BenchmarkArguments) -> list[Length]:
    if args.text is None:
        return lengths.table(args.lengths)
    from transformers import AutoTokenizer

    return lengths.measured(args.text, AutoTokenizer.from_pretrained(args.model))


def make(name: str, job: Job) -> Contender:
    """The contender of that name."""
    return Ours(job, private=name == PRIVATE) if name in (PRIVATE, PLAIN) else peers.make(name, job)


def measure_memory(args: CommonArguments, setting: Setting, name: str) -> Memory:
    """Memory of one contender; for a process of its own."""
    set_threads(args)
    peers.load_packages(name)
    empty = memory_now(torch.device(args.device))
    job = replace(job_of(args, setting), copied=False)
    contender = make(name, job)
    (draw,) = draws_of(setting, job, 1)
    if len(set(setting.lengths)) == 1:
        draw = draw[: 2 * setting.batch]  # later micro-batches have the same shape and need no more memory
    try:
        # A step with one example first, which creates the optimizer's state.
        return memory_of(contender, [draw[:1], draw], job.device, empty=empty)
    finally:
        contender.close()
