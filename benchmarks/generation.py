"""Texts per second of the generation backends in this process, beside one text at a time.

    python -m benchmarks.generation --model .demo/SmolLM2-135M --output benchmarks/results/generation_HARDWARE_DATE.md

End tokens are switched off, so that every text has all its tokens and a side is not faster by shorter texts. In each
round every side takes its turn: `--backend hf` one text at a time (`--alone` of the prompts), both backends in batches,
and transformers' own `generate` in batches, which is what hf did before it had a loop of its own. Ratios are taken
within a round. Times are of the processor, over all threads, so that other jobs on the machine matter little: give one
thread (OMP_NUM_THREADS=1), since threads that wait for each other use the processor too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import tables
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import sampling_config
from utils.generation.batches import TextJob, batch_seed, make_jobs, plan_batches
from utils.generation.continuous import ContinuousBackend
from utils.generation.hf import GenerateBackend
from utils.models.loading import load_tokenizer

Side = Callable[[Sequence[TextJob], int], None]  # draws the texts of jobs, with a seed
_NO_END = -1
_ALONE = "hf, batch size 1"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--prompts", type=int, default=64, help="number of texts of a batch side per round")
    parser.add_argument("--alone", type=int, default=1, help="number of texts of the side with batch size 1 per round")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens of each text")
    parser.add_argument("--batch_size", type=int, default=64, help="texts at once")
    parser.add_argument("--shared_words", type=int, default=0, help="words of one prompt for all; 0: different prompts")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--output", help="file for the table; default: print it only")
    args = parser.parse_args()
    machine = tables.machine("benchmarks.generation", torch.device("cpu"), sys.argv[1:])
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    jobs = make_jobs(tokenizer, _prompts(args), sys.maxsize)
    rates = _rates(_sides(model, tokenizer, jobs, args), jobs, args)
    rows = [
        [name, tables.spread(own, 3), tables.spread(tables.ratios(own, rates[_ALONE]), 2)]
        for name, own in rates.items()
    ]
    header = ["side", "texts per processor second", f"over {_ALONE}"]
    tables.publish([_title(args, jobs), machine, tables.markdown(header, rows)], args.output)


def _title(args: argparse.Namespace, jobs: Sequence[TextJob]) -> str:
    shared = "one prompt for all" if args.shared_words else "different prompts"
    return (
        f"# Generation: {Path(args.model).name}, {args.prompts} texts of {args.new_tokens} tokens, "
        f"{shared} of {max(len(job.ids) for job in jobs)} tokens"
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.shared_words:
        return ["Write about " + "the weather " * (args.shared_words // 2)] * args.prompts
    return [f"Question {number}: what do you know about the number {number}?\n" for number in range(args.prompts)]


def _sides(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, jobs: Sequence[TextJob], args: argparse.Namespace
) -> dict[str, tuple[Side, int]]:
    """Name -> (what draws, number of texts per round)."""
    limit, size = max(len(job.ids) for job in jobs) + args.new_tokens, args.batch_size

    def of(kind: type[GenerateBackend] | type[ContinuousBackend], batch_size: int) -> Side:
        def draw(some: Sequence[TextJob], seed: int) -> None:
            sampling = SamplingArguments("unused", max_length=limit, batch_size=batch_size, seed=seed)
            backend = kind(model, tokenizer, sampling)
            backend._config.eos_token_id = [_NO_END]
            for _ in backend.draw(some, ()):
                pass

        return draw

    def before(some: Sequence[TextJob], seed: int) -> None:
        sampling = SamplingArguments("unused", max_length=limit, batch_size=size, seed=seed)
        for batch in plan_batches(some, size, limit):
            _library(model, tokenizer, batch, sampling)

    return {
        _ALONE: (of(GenerateBackend, 1), args.alone),
        f"hf, batch size {size}": (of(GenerateBackend, size), args.prompts),
        f"continuous, batch size {size}": (of(ContinuousBackend, size), args.prompts),
        f"transformers' loop, batch size {size}": (before, args.prompts),
    }


def _library(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[TextJob], sampling: SamplingArguments
) -> None:
    width = max(len(job.ids) for job in batch)
    config = sampling_config(model, tokenizer, sampling)
    config.update(max_new_tokens=sampling.max_length - width, eos_token_id=[_NO_END])
    padded = [[config.pad_token_id] * (width - len(job.ids)) + list(job.ids) for job in batch]
    mask = [[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in batch]
    torch.manual_seed(batch_seed(sampling.seed, batch))
    model.generate(torch.tensor(padded), attention_mask=torch.tensor(mask), generation_config=config)


def _rates(
    sides: dict[str, tuple[Side, int]], jobs: Sequence[TextJob], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Texts per processor second of each side's rounds."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(args.rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            draw, count = sides[name]
            began = time.process_time()
            draw(jobs[:count], number)
            rates[name].append(count / (time.process_time() - began))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.3f} texts/s", file=sys.stderr, flush=True)
    return rates


if __name__ == "__main__":
    main()
