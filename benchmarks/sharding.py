"""Memory and traffic of sharded training: computed for Llama 7B to 70B, measured for small Llamas on this machine.

    python -m benchmarks.sharding --output benchmarks/results/NAME.md
    python -m benchmarks.sharding --paper_only

The computed part comes from `utils/models/memory.py` and the models' configurations. The measured part runs private
steps of a small Llama on CPU processes that communicate by gloo, and compares their memory and traffic with the
predictions of that module.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks import lengths, tables
from benchmarks.memory_table import on_paper
from benchmarks.ranks import Job, RankMemory, measure
from dptune import deal
from dptune._validate import require_count
from utils.cli.flags import exit_on_invalid_argument, parse

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
}
DEALT_RANKS = (1, 2, 8, 64)
_DEALT_DRAWS = 20
_MIB = 1 << 20


@dataclass
class ShardingArguments:
    """What to measure."""

    _argument_group_name = "sharding benchmark"

    shape: str = field(default="small", metadata={"help": "shape of the Llama to run", "choices": list(SHAPES)})
    block: int = field(default=256, metadata={"help": "maximum tokens per example"})
    max_tokens: int = field(default=1024, metadata={"help": "maximum padded tokens per forward pass"})
    draw: int = field(default=16, metadata={"help": "examples per step"})
    processes: int = field(default=2, metadata={"help": "number of processes in the distributed runs"})
    rank: int = field(default=16, metadata={"help": "rank of the adapters on q, k, v and o"})
    paper_only: bool = field(default=False, metadata={"help": "only compute the tables for large models"})
    output: str | None = field(default=None, metadata={"help": "Markdown file for the result; default: only print"})

    def __post_init__(self) -> None:
        for name in ("block", "max_tokens", "draw", "processes", "rank"):
            require_count(f"--{name}", getattr(self, name))


def main(args: ShardingArguments) -> None:
    """Compute, measure, print, and write to --output."""
    # The measured processes use one thread each; set it here too, so that the printed number is right.
    torch.set_num_threads(1)
    machine = tables.machine("benchmarks.sharding", torch.device("cpu"), sys.argv[1:])
    parts = ["# Sharded training: memory and traffic", machine, on_paper()]
    if not args.paper_only:
        parts += [measured(args), dealing(args)]
    tables.publish(parts, args.output)


def jobs(args: ShardingArguments) -> list[Job]:
    """One process, several unsharded ones, several sharded ones; each without and with checkpointing, with adapters and
    with every parameter trained."""
    layouts = [(1, False), *([(args.processes, False), (args.processes, True)] if args.processes > 1 else [])]
    sizes: dict[str, Any] = {"shape": SHAPES[args.shape], "block": args.block, "token_budget": args.max_tokens}
    sizes |= {"draw": args.draw, "rank": args.rank}
    return [
        Job(**sizes, processes=count, sharded=sharded, checkpointing=checkpointing, whole=whole)
        for whole in (False, True)
        for checkpointing in (False, True)
        for count, sharded in layouts
    ]


def measured(args: ShardingArguments) -> str:
    """The section on the memory and traffic of real processes."""
    rows = []
    for job in jobs(args):
        print(f"{job.processes} processes, sharded: {job.sharded}, whole: {job.whole}", file=sys.stderr, flush=True)
        ranks = measure(job)
        rows.append(_row(job, max(ranks, key=lambda one: one.peak)))
    header = [
        "run",
        "base's MiB held",
        "at most",
        "peak MiB",
        "predicted",
        "peak / predicted",
        "MiB sent per step",
        "predicted",
    ]
    shape = ", ".join(f"{name} {value}" for name, value in SHAPES[args.shape].items())
    return "\n\n".join(
        [
            "## Measured: small Llamas on this machine's CPU, float32",
            f"{shape}; adapters of rank {args.rank}; one step of {args.draw} abstracts cut at {args.block} tokens, at "
            f"most {args.max_tokens} padded tokens per forward pass. Values are of the rank with the highest peak. "
            "Held: the base model's weights between steps, at most total / processes + root group. Peak: all allocated "
            "tensors, including weights and moments. Sent: bytes, in a ring, of gathered shares (gradients that every "
            "rank needs, and sharded weights) and of sums that go to the rank that holds the rows.",
            tables.markdown(header, rows),
        ]
    )


def _row(job: Job, seen: RankMemory) -> list[str]:
    count = f"{job.processes} process{'es' if job.processes > 1 else ''}"
    trained = "all trained" if job.whole else "LoRA"
    how = f"{', sharded' if job.sharded else ''}{', checkpointing' if job.checkpointing else ''}"
    label = f"{trained}, {count}{how}"
    bound = seen.held.total // job.processes + seen.held.root if job.sharded else seen.held.total
    sizes = [seen.held.held, bound, seen.peak, seen.predicted_peak]
    cells = [*(f"{size / _MIB:.1f}" for size in sizes), f"{seen.peak / seen.predicted_peak:.2f}"]
    return [label, *cells, *(f"{size / _MIB:.1f}" for size in (seen.sent, seen.predicted_sent))]


def dealing(args: ShardingArguments) -> str:
    """The section on how evenly dptune's `deal` distributes draws."""
    table = np.minimum([sum(one) for one in lengths.table("abstracts")], 512)
    rng = np.random.default_rng(0)
    rows = []
    for ranks in DEALT_RANKS:
        draws = [rng.choice(table, 64 * ranks) for _ in range(_DEALT_DRAWS)]
        found = np.array([dealt_evenly(drawn, ranks, args.max_tokens) for drawn in draws])
        mean, worst = found.mean(axis=0), found.max(axis=0)
        rows.append(
            [str(ranks), f"{mean[0]:.1f}", f"{mean[1]:.1%} ({worst[1]:.1%})", f"{mean[2]:.2%} ({worst[2]:.2%})"]
        )
    header = ["ranks", "micro-batches per rank", "padding, mean (worst)", "slowest rank over the mean, mean (worst)"]
    return "\n\n".join(
        [
            "## Dealing a draw: padding and imbalance",
            f"{_DEALT_DRAWS} draws of 64 abstracts per rank, cut at 512 tokens; at most {args.max_tokens} padded "
            "tokens per forward pass. Padding: share of all tokens. Slowest rank: excess of real tokens over the mean.",
            tables.markdown(header, rows),
        ]
    )


def dealt_evenly(drawn: np.ndarray, ranks: int, token_budget: int) -> tuple[float, float, float]:
    """(micro-batches per rank, share of padding, tokens of the fullest rank / mean - 1) of one draw."""
    dealt = deal(np.arange(len(drawn)), drawn, token_budget=token_budget, ranks=ranks)
    padded = sum(len(part) * int(drawn[part].max()) for parts in dealt for part in parts if len(part))
    tokens = [sum(int(drawn[part].sum()) for part in parts) for parts in dealt]
    return len(dealt[0]), 1 - sum(tokens) / padded, max(tokens) / (sum(tokens) / ranks) - 1


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(ShardingArguments, description=__doc__))
