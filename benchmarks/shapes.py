"""What fixed shapes and the grid cost: a private step beside the same one with shapes that follow the draw.

    python -m benchmarks.shapes --model .demo/SmolLM2-135M --output benchmarks/results/shapes_HARDWARE_DATE.md

The micro-batches of both sides take turns in one process, on the same draws, with LoRA. Noise is timed on its own: on
the grid in float64, and added in float32, as it was before.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks import tables
from benchmarks.lengths import table
from dptune import CausalLMLoss, Keystream, Ledger, PrivacyConfig, PrivateStep, add_lora, deal
from dptune.grid import grid_of
from dptune.noise import GaussianNoise
from dptune.shapes import Shape, Shapes, deal_in_shapes
from dptune.units.batches import parts_of
from utils.data.tokenization import TokenizedDataset

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def random_texts(lengths: np.ndarray, vocabulary: int) -> TokenizedDataset:
    """Texts of these lengths, every token but the first learned."""
    chance = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = chance.integers(3, vocabulary, starts[-1], dtype=np.int32)
    return TokenizedDataset(ids, ~np.isin(np.arange(len(ids)), starts), starts, num_cut=0)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--lengths", default="chat", help="kind of text, see benchmarks/lengths.json")
    parser.add_argument("--block", type=int, default=128, help="maximum tokens per text")
    parser.add_argument("--draw", type=int, default=32, help="texts per step")
    parser.add_argument("--examples", type=int, default=4, help="widest texts per forward pass")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side")
    parser.add_argument("--output", help="file for the tables; default: print them only")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train()
    add_lora(model, rank=16, targets=_TARGETS)
    known = np.array([sum(length) for length in table(args.lengths)])
    drawn = np.random.default_rng(0).choice(known, args.draw * args.rounds)
    lengths = np.minimum(drawn, args.block)
    rows = [_step_row(model, lengths, args), _noise_row(model)]
    header = ["what", "now [s]", "before [s]", "ratio of medians", "padding now", "padding before"]
    parts = [
        f"# Fixed shapes and the grid: {Path(args.model).name}, {args.lengths} texts",
        tables.machine("benchmarks.shapes", torch.device("cpu"), sys.argv[1:]),
        tables.markdown(header, rows),
    ]
    tables.publish(parts, args.output)


def _step_row(model: nn.Module, lengths: np.ndarray, args: argparse.Namespace) -> list[str]:
    data = random_texts(lengths, model.config.vocab_size)
    budget, losses = args.examples * args.block, CausalLMLoss(model)
    shapes = Shapes(args.block, budget, args.draw, masked=False)
    config = PrivacyConfig(
        num_examples=len(data) + 1,
        expected_batch_size=args.draw,
        steps=1000,
        clip_norm=1.0,
        noise_multiplier=1.0,
        delta=1e-5,
    )
    draws = np.split(np.arange(len(data)), args.rounds)

    def cut(draw: np.ndarray, *, fixed: bool) -> list[tuple[Shape, np.ndarray]]:
        if fixed:
            return [(shape, rows) for shape, (rows,) in deal_in_shapes(draw, lengths, shapes)]
        parts = deal(draw, lengths, token_budget=budget)[0]
        return [(Shape(len(rows), int(lengths[rows].max())), rows) for rows in parts]

    times: dict[bool, list[float]] = {True: [], False: []}
    with (
        TemporaryDirectory() as folder,
        PrivateStep(model, config, ledger=Ledger(Path(folder) / "ledger.jsonl")) as step,
    ):
        for draw in draws:
            spent = {True: 0.0, False: 0.0}
            sides = {fixed: cut(draw, fixed=fixed) for fixed in spent}
            turns = sorted(
                (place / len(side), fixed, place) for fixed, side in sides.items() for place in range(len(side))
            )
            for _, fixed, place in turns:
                shape, rows = sides[fixed][place]
                began = time.perf_counter()
                (part,) = parts_of(rows, data)
                batch = part.batch(rows, shape, 0)
                step.backward(losses(**batch.inputs), items=rows)
                spent[fixed] += time.perf_counter() - began
            began = time.perf_counter()
            step.finish()
            ending = time.perf_counter() - began
            for fixed, seconds in spent.items():
                times[fixed].append(seconds + ending)

    def padding(*, fixed: bool) -> str:
        padded = sum(shape.items * shape.width for draw in draws for shape, _ in cut(draw, fixed=fixed))
        return f"{1 - lengths.sum() / padded:.1%}"

    return ["private step", *_compared(times[True], times[False]), padding(fixed=True), padding(fixed=False)]


def _noise_row(model: nn.Module) -> list[str]:
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = torch.zeros(size)
    with GaussianNoise(size, Keystream.for_tests(0)) as noise:
        prepared = [noise.take() for _ in range(6)]

    def on_grid(values: Tensor) -> None:
        grid = grid_of(1.0)
        for own, more in zip(total.split(1 << 16), values.split(1 << 16), strict=True):
            own.copy_(more.mul_(1 / grid).add_(own, alpha=1 / grid).round_().mul_(grid))

    def in_float32(values: Tensor) -> None:
        total.add_(values, alpha=1.0)

    now = [_seconds(on_grid, values.clone()) for values in prepared]
    before = [_seconds(in_float32, values.float()) for values in prepared]
    return [f"adding the noise of {size:,} values", *_compared(now, before), "", ""]


def _seconds(work: Callable[[Tensor], None], values: Tensor) -> float:
    began = time.perf_counter()
    work(values)
    return time.perf_counter() - began


def _compared(now: list[float], before: list[float]) -> list[str]:
    return [f"{median(now):.4f}", f"{median(before):.4f}", f"{median(now) / median(before):.3f}"]


if __name__ == "__main__":
    main()
