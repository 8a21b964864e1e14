"""The neighbour test for authors: removing one author changes the noiseless sum by at most C, whatever they wrote.

The sum also equals the one from float64 with one example at a time. Both tests use the same code as a run:
`AuthorDraw`, `MicroBatches` and `PrivateStep`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import CausalLMLoss, InvalidArgument, Keystream, Ledger, PlainStep, PoissonSampler, PrivateStep, add_lora
from dptune.shapes import Shapes
from dptune.units.batches import AuthorDraw, AuthorSampler, parts_of
from tests.examples import random_examples, randomise_adapters
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.reference import example_gradients, flat
from tests.tiny import tiny_llama
from tests.utils.training.test_micro_batches import Memory
from utils.cli.interruption import StopRequest
from utils.cli.launch import make_accelerator
from utils.data.tokenization import TokenizedDataset
from utils.training.micro_batches import MicroBatches

K = 5
SIZES = range(1, K + 4)  # rows of each author
EXAMPLES = random_examples(sum(SIZES), seed=4, vocab_size=60, longest=14)
LONGEST, MANY = 14, 1e6  # so many items are expected that every micro-batch fills its budget
ROWS = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
EVERYBODY = AuthorSampler(PoissonSampler(len(SIZES), 1.0, Keystream.for_tests(0)), ROWS, K, mean=True).draw()
OWN = EVERYBODY.rows  # up to k rows of each; an author with three is filled up to four
ROUNDING = 1e-5


def adapted(seed: int = 5) -> nn.Module:
    model = tiny_llama(seed, vocab_size=60, hidden=16, layers=1)
    add_lora(model, rank=2, alpha=4.0, targets=("q_proj", "v_proj", "o_proj"))
    randomise_adapters(model, seed, scale=0.3)
    return model


def as_data(examples: Sequence[Any]) -> TokenizedDataset:
    ids = [np.array(ids, dtype=np.int32) for ids, _ in examples]
    answers = [np.array(labels) != -100 for _, labels in examples]
    starts = np.concatenate([[0], np.cumsum([len(part) for part in ids])])
    return TokenizedDataset(np.concatenate(ids), np.concatenate(answers), starts, num_cut=0)


DATA = as_data(EXAMPLES)


class ClipsEveryRow(PrivateStep):
    """Broken on purpose: each row is clipped on its own before an author's rows are added."""

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1, items: Any = None) -> Any:
        del rows_per_unit, items
        return super().backward(losses)


def summed(
    draw: AuthorDraw,
    clip_norm: float,
    *,
    step_type: type[PrivateStep] = PrivateStep,
    data: TokenizedDataset = DATA,
    model: nn.Module | None = None,
    budget: int = 100,
    limit: float = float("inf"),
    **ranks: Any,
) -> tuple[Tensor, list[Any], Memory]:
    """(clipped sum over the authors, statistics, memory used)."""
    model = model or adapted()
    losses = CausalLMLoss(model)
    memory = Memory(model, limit, "backward")
    config = config_for(len(SIZES), clip_norm=clip_norm)
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl")
        with step_type(model, config, ledger=ledger, noise=NoNoise(size), **ranks) as step:  # type: ignore[arg-type]
            seen = MicroBatches(data, Shapes(LONGEST, budget, MANY), 0, make_accelerator()).run(
                draw, step, losses, StopRequest()
            )
            assert seen is not None
            step.finish()
        assert ledger.steps == (1 if ranks.get("rank", 0) == 0 else 0)
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    total = torch.cat([grad.flatten().double() for grad in grads if grad is not None])
    return total * config.expected_batch_size, seen, memory


def oracle(rows: Sequence[np.ndarray], clip_norm: float, mean: bool) -> tuple[Tensor, list[float]]:
    """The oracle, in float64 with one example at a time: add or average an author's gradients, then clip once."""
    gradients = [flat(grads) for grads in example_gradients(adapted(), EXAMPLES)]
    total, norms = torch.zeros_like(gradients[0]), []
    for own in rows:
        author = sum(gradients[row] for row in own) / (len(own) if mean else 1)
        norms.append(float(author.norm()))
        total += author * min(1.0, clip_norm / norms[-1])
    return total, norms


def test_the_authors_here_are_of_every_kind() -> None:
    assert [len(rows) for rows in OWN] == [1, 2, 3, 4, 5, 5, 5, 5]
    assert [part.rows_per_unit for part in parts_of(EVERYBODY, DATA)] == [1, 2, 4, 5]


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("budget", [20, 1000])
def test_the_sum_is_the_oracles(mean: bool, quantile: float, budget: int) -> None:
    """With clipping active for all, for half and for none."""
    _, norms = oracle(OWN, 1.0, mean)
    clip_norm = float(np.quantile(norms, quantile)) * (0.5 if quantile == 0 else 1.001)
    expected, norms = oracle(OWN, clip_norm, mean)
    found, seen, _ = summed(AuthorDraw(OWN, mean, K), clip_norm, budget=budget)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    measured = torch.cat([stats.norms for stats in seen]).tolist()
    assert sorted(measured) == pytest.approx(sorted(norms), rel=1e-4)
    assert sum(len(stats.losses) for stats in seen) == sum(map(len, OWN)), "rows that filled up are not reported"


def moved(mean: bool, clip_norm: float, **how: Any) -> list[float]:
    """Change of the sum without each author, divided by C."""
    whole, _, _ = summed(AuthorDraw(OWN, mean, K), clip_norm, **how)
    others = [[own for own in OWN if own is not gone] for gone in OWN]
    without = [summed(AuthorDraw(rows, mean, K), clip_norm, **how)[0] for rows in others]
    return [float((whole - rest).norm()) / clip_norm for rest in without]


@pytest.mark.parametrize("mean", [True, False])
def test_one_author_moves_the_sum_by_at_most_c(mean: bool) -> None:
    for clip_norm in (0.01, 0.3, 1e3):
        moves = moved(mean, clip_norm)
        assert max(moves) <= 1 + ROUNDING
        if clip_norm == 0.01:
            assert moves == pytest.approx([1.0] * len(OWN), rel=1e-3), "the bound is reached"


@pytest.mark.parametrize("mean", [True, False])
def test_rows_clipped_one_by_one_break_the_bound(mean: bool) -> None:
    """With C below every row's norm, an author of five similar rows would change the sum by up to 5 C."""
    alike = as_data([EXAMPLES[0]] * len(EXAMPLES))
    with pytest.raises(AssertionError):
        assert max(moved(mean, 1e-3, step_type=ClipsEveryRow, data=alike)) <= 1 + ROUNDING
    assert max(moved(mean, 1e-3, data=alike)) <= 1 + ROUNDING


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("limit", [5 * 14, 6 * 14])
def test_out_of_memory_never_splits_an_author(mean: bool, limit: int) -> None:
    expected, norms = oracle(OWN, 0.3, mean)
    found, seen, memory = summed(AuthorDraw(OWN, mean, K), 0.3, budget=10_000, limit=limit)
    assert memory.failed
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert sum(len(stats.norms) for stats in seen) == len(norms)


def test_an_author_who_does_not_fit_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidArgument, match=r"^examples_per_unit: out of memory on one author's \d rows of \d+ tok"):
        summed(AuthorDraw(OWN, mean=True, most=K), 0.3, limit=15)


def test_nobody_drawn_is_a_step_of_noise_alone() -> None:
    found, seen, memory = summed(AuthorDraw([], mean=True, most=K), 0.3)
    assert not found.any()
    assert seen == memory.attempts == []


@pytest.mark.parametrize("mean", [True, False])
def test_without_privacy_the_authors_are_averaged_too(mean: bool) -> None:
    model = adapted()
    losses = CausalLMLoss(model)
    with PlainStep(model, 5.0) as step:
        MicroBatches(DATA, Shapes(LONGEST, 100, MANY), 0, make_accelerator()).run(
            AuthorDraw(OWN, mean, K), step, losses, StopRequest()
        )
        step.finish()
        grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        found = torch.cat([grad.flatten().double() for grad in grads if grad is not None]) * 5.0
    expected, _ = oracle(OWN, float("inf"), mean)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def _rank(rank: int, gather: Callable[[Tensor], Tensor], draws: list[AuthorDraw]) -> list[tuple[Tensor, int]]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    found = [summed(draw, 0.3, budget=60, gather=gather, rank=rank, world_size=2) for draw in draws]
    return [(total, len(memory.attempts)) for total, _, memory in found]


def test_two_processes_find_the_same_sum_in_as_many_forward_passes() -> None:
    draws = [
        AuthorDraw(OWN, mean=True, most=K),
        AuthorDraw(OWN[2:3], mean=True, most=K),
        AuthorDraw([], mean=True, most=K),
    ]
    ranks = run_processes(2, _rank, draws)
    for number, draw in enumerate(draws):
        (one, passes), (other, also) = (rank[number] for rank in ranks)
        assert torch.equal(one, other)
        assert passes == also, "sharded weights need all ranks at every forward pass"
        expected, _ = oracle(draw.rows, 0.3, mean=True)
        assert (one - expected).norm() <= 1e-5 * expected.norm()
