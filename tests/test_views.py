"""Several views of an example: the mean of their gradients is clipped once, so one example moves the sum by at most C.

The sum is that of the slow oracle, one view at a time in float64. All tests use the code of a run: `MicroBatches`,
`PrivateStep` and `TokenDropout`.
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

from dptune import CausalLMLoss, InvalidArgument, Ledger, PlainStep, PoissonSampler, PrivateStep, add_lora
from dptune.shapes import Shapes
from dptune.units.batches import AuthorDraw, UnitDraw
from tests.examples import random_examples, randomise_adapters
from tests.private_sum import NoNoise, config_for
from tests.processes import run_processes
from tests.reference import Example, example_gradients, flat
from tests.test_author_neighbours import ROUNDING, ClipsEveryRow, as_data
from tests.tiny import tiny_llama
from tests.utils.training.test_micro_batches import Memory
from utils.cli.interruption import StopRequest
from utils.cli.launch import make_accelerator
from utils.training.micro_batches import MicroBatches
from utils.training.views import TokenDropout

VIEWS, VOCABULARY, LONGEST = 3, 60, 14
EXAMPLES = random_examples(9, seed=4, vocab_size=VOCABULARY, longest=LONGEST)
DATA = as_data(EXAMPLES)
AUTHORS = [np.array(rows) for rows in ([0], [1, 2], [3, 4, 5], [6, 7, 8])]  # three are filled up to four
DRAWS: dict[str, UnitDraw] = {
    "examples": np.arange(9),
    "authors, mean": AuthorDraw(AUTHORS, mean=True, most=4),
    "authors, sum": AuthorDraw(AUTHORS, mean=False, most=4),
}


def model_of(kind: str) -> nn.Module:
    """A float64 model in training mode, without dropout: adapters, or all weights."""
    model = tiny_llama(5, vocab_size=VOCABULARY, hidden=16, layers=1)
    if kind == "LoRA":
        add_lora(model, rank=2, alpha=4.0, targets=("q_proj", "v_proj", "o_proj"))
        randomise_adapters(model, 5, scale=0.3)
    return model.double().train()


def shapes(views: int = VIEWS, budget: int = 200) -> Shapes:
    return Shapes(LONGEST, budget, drawn=1e6, masked=False, views=views)


class Seen:
    """Losses that note the rows of each pass, as the model sees them."""

    def __init__(self, model: nn.Module) -> None:
        self._losses, self.passes = CausalLMLoss(model), list[list[Example]]()

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        self.passes.append(list(zip(input_ids.tolist(), labels.tolist(), strict=True)))
        return self._losses(input_ids, labels)


class Units(PrivateStep):
    """A step that notes (number of items, rows per unit) of each pass."""

    fed: list[tuple[int, int]]

    def backward(self, losses: Tensor, *, rows_per_unit: int = 1, items: Any = None) -> Any:
        self.fed = [*getattr(self, "fed", []), (len(items), rows_per_unit)]
        return super().backward(losses, rows_per_unit=rows_per_unit, items=items)


def summed(
    model: nn.Module,
    losses: Callable[..., Tensor],
    draw: UnitDraw,
    clip_norm: float,
    *,
    step_type: type[PrivateStep] = PrivateStep,
    own: Shapes | None = None,
    **how: Any,
) -> tuple[Tensor, list[Any], PrivateStep]:
    """(the clipped sum, flat float64; statistics of each pass; the step)."""
    config, size = config_for(9, clip_norm=clip_norm), sum(p.numel() for p in model.parameters() if p.requires_grad)
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl")
        with step_type(model, config, ledger=ledger, noise=NoNoise(size), **how) as step:  # type: ignore[arg-type]
            micro_batches = MicroBatches(DATA, own or shapes(), 0, make_accelerator())
            seen = micro_batches.run(draw, step, losses, StopRequest())
            assert seen is not None
            step.finish()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([grad.flatten().double() for grad in grads]) * config.divisor, seen, step


# --- the oracle ---


def dropped(model: nn.Module) -> tuple[Seen, TokenDropout]:
    """Losses with token dropout, and what notes the rows behind it."""
    seen = Seen(model)
    words = torch.arange(3, VOCABULARY)
    return seen, TokenDropout(seen, model, 0.4, torch.arange(VOCABULARY) >= 3, words)


def units_of(seen: Seen, step: Units) -> list[list[Example]]:
    """The views that each unit had, of all its rows."""
    units = []
    for rows, (items, size) in zip(seen.passes, step.fed, strict=True):
        assert len(rows) % size == 0
        units += [rows[number * size : (number + 1) * size] for number in range(items)]
    return [[(ids, labels) for ids, labels in unit if set(labels) != {-100}] for unit in units]


def oracle(model: nn.Module, units: list[list[Example]], clip_norm: float, rows: str) -> tuple[Tensor, list[float]]:
    """One view at a time: the mean over views (of authors: and the mean or the sum over rows), clipped, added."""
    total, norms = torch.zeros(1, dtype=torch.float64), []
    for unit in units:
        gradients = [flat(grads) for grads in example_gradients(model, unit)]
        mean = torch.stack(gradients).mean(0)
        own = mean * (len(unit) / VIEWS if rows == "authors, sum" else 1)
        norms.append(float(own.norm()))
        total = total + own * min(1.0, clip_norm / norms[-1])
    return total, norms


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", DRAWS)
@pytest.mark.parametrize("kind", ["LoRA", "whole"])
def test_the_sum_is_the_oracles(kind: str, rows: str, quantile: float) -> None:
    """With clipping active for all, for half and for none."""
    model = model_of(kind)
    torch.manual_seed(1)
    seen, losses = dropped(model)
    _, stats, step = summed(model, losses, DRAWS[rows], 1.0, step_type=Units)
    assert isinstance(step, Units)
    units = units_of(seen, step)
    _, norms = oracle(model, units, 1.0, rows)
    assert sorted(torch.cat([one.norms for one in stats]).tolist()) == pytest.approx(sorted(norms), rel=1e-6)
    clip_norm = float(np.quantile(norms, quantile)) * (0.5 if quantile == 0 else 1.001)
    expected, _ = oracle(model, units, clip_norm, rows)
    torch.manual_seed(1)  # the same masks
    found, stats, _ = summed(model, dropped(model)[1], DRAWS[rows], clip_norm)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert sum(len(one.losses) for one in stats) == VIEWS * 9, "what filled up is not reported"


def test_a_unit_has_all_views_of_its_rows_and_they_differ() -> None:
    model = model_of("LoRA")
    seen, losses = dropped(model)
    _, _, step = summed(model, losses, DRAWS["authors, mean"], 1.0, step_type=Units)
    assert isinstance(step, Units)
    found = [[without_padding(labels) for _, labels in unit] for unit in units_of(seen, step)]
    assert sorted(found) == sorted([EXAMPLES[row][1] for row in rows for _ in range(VIEWS)] for rows in AUTHORS)
    views = [tuple(ids) for unit in units_of(seen, step) for ids, _ in unit]
    assert len(set(views)) > 0.8 * len(views)


def without_padding(labels: list[int]) -> list[int]:
    """The last token of each example is learned."""
    return labels[: max(place for place, label in enumerate(labels) if label != -100) + 1]


def test_the_masks_of_dropout_are_averaged_before_the_one_clip() -> None:
    """Against plain autograd in the same forward pass, which draws the same masks."""
    model = tiny_llama(5, vocab_size=VOCABULARY, hidden=16, layers=1)
    add_lora(model, rank=2, alpha=4.0, targets=("q_proj", "v_proj"), dropout=0.5)
    randomise_adapters(model, 5, scale=0.3)
    model.double().train()
    seen, whole = Seen(model), shapes(budget=10_000)
    torch.manual_seed(2)
    draw = np.array([int(np.argmax(DATA.lengths))])
    summed(model, seen, draw, 1.0, own=whole)
    (rows,) = seen.passes
    torch.manual_seed(2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = CausalLMLoss(model)(*(torch.tensor([row[part] for row in rows]) for part in (0, 1)))
    views = [
        torch.cat([grad.flatten() for grad in torch.autograd.grad(one, trained, retain_graph=True)])
        for one in losses[:VIEWS]
    ]
    assert not torch.allclose(views[0], views[1])
    mean = torch.stack(views).mean(0)
    clip_norm = float(mean.norm()) / 2
    torch.manual_seed(2)
    found, _, _ = summed(model, Seen(model), draw, clip_norm, own=whole)
    assert (found - mean / 2).norm() < 1e-6 * found.norm()


def test_without_privacy_views_are_averaged_too() -> None:
    model = model_of("LoRA")
    torch.manual_seed(1)
    seen, losses = dropped(model)
    _, _, step = summed(model, losses, DRAWS["examples"], 1.0, step_type=Units)
    assert isinstance(step, Units)
    expected, _ = oracle(model, units_of(seen, step), float("inf"), "examples")
    torch.manual_seed(1)
    with PlainStep(model, 4.5) as plain:
        MicroBatches(DATA, shapes(), 0, make_accelerator()).run(
            DRAWS["examples"], plain, dropped(model)[1], StopRequest()
        )
        plain.finish()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found = torch.cat([grad.flatten() for grad in grads]) * 4.5
    assert (found - expected).norm() < 1e-6 * expected.norm()


# --- neighbours ---


class OwnViews:
    """Losses whose views follow from a row's own tokens and the view's number, so that no row changes another's."""

    def __init__(self, model: nn.Module, views: int) -> None:
        self._losses, self._views = CausalLMLoss(model), views

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        view = (torch.arange(len(input_ids)) % self._views)[:, None]
        changed = (input_ids + 7 * view + torch.arange(input_ids.shape[1])) % 3 == 0
        return self._losses(torch.where(changed, (input_ids + 11 * view) % VOCABULARY, input_ids), labels)


def moved(views: int, clip_norm: float, rows: str, **how: Any) -> list[float]:
    """Change of the sum without each unit, divided by C."""
    model, draw = model_of("LoRA"), DRAWS[rows]
    losses = OwnViews(model, views)

    def total(kept: UnitDraw) -> Tensor:
        return summed(model, losses, kept, clip_norm, own=shapes(views), **how)[0]

    whole = total(draw)
    return [float((whole - total(without(draw, gone))).norm()) / clip_norm for gone in range(len(draw))]


def without(draw: UnitDraw, gone: int) -> UnitDraw:
    if isinstance(draw, AuthorDraw):
        return AuthorDraw([rows for number, rows in enumerate(draw.rows) if number != gone], draw.mean, draw.most)
    return np.delete(draw, gone)


@pytest.mark.parametrize("rows", DRAWS)
@pytest.mark.parametrize("views", [1, 4])
def test_one_unit_moves_the_sum_by_at_most_c_whatever_the_number_of_views(views: int, rows: str) -> None:
    for clip_norm in (0.01, 0.3):
        moves = moved(views, clip_norm, rows)
        assert max(moves) <= 1 + ROUNDING
        if clip_norm == 0.01:
            assert moves == pytest.approx([1.0] * len(moves), rel=1e-3), "the bound is reached"


def test_views_clipped_one_by_one_break_the_bound() -> None:
    """With C below every view's norm, an example of four views would change the sum by up to 4 C."""
    with pytest.raises(AssertionError):
        assert max(moved(4, 1e-3, "examples", step_type=ClipsEveryRow)) <= 1 + ROUNDING


# --- draws, memory, ranks ---


def test_an_example_counts_once_in_the_draw_however_many_views_it_has() -> None:
    """The step compares what it was fed with the sampler's draw."""
    model, sampler = model_of("LoRA"), PoissonSampler(9, 0.5)
    with TemporaryDirectory() as folder:
        more: dict[str, Any] = {"sampler": sampler, "ledger": Ledger(Path(folder) / "ledger.jsonl")}
        with PrivateStep(model, config_for(9, clip_norm=1.0), **more) as step:
            for _ in range(4):
                MicroBatches(DATA, shapes(), 0, make_accelerator()).run(
                    sampler.draw(), step, OwnViews(model, VIEWS), StopRequest()
                )
                step.finish()


@pytest.mark.parametrize("limit", [VIEWS * LONGEST, 2 * VIEWS * LONGEST])
def test_out_of_memory_never_splits_the_views_of_an_example(limit: int) -> None:
    model = model_of("LoRA")
    losses = OwnViews(model, VIEWS)
    expected, _, _ = summed(model, losses, DRAWS["examples"], 0.3)
    memory = Memory(model, limit, "backward")
    found, stats, _ = summed(model, losses, DRAWS["examples"], 0.3, own=shapes(budget=10_000))
    assert memory.failed
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert sum(len(one.norms) for one in stats) == 9


def test_views_that_do_not_fit_are_refused_with_the_remedy() -> None:
    model = model_of("LoRA")
    Memory(model, VIEWS * LONGEST - 1)
    longest = np.array([int(np.argmax(DATA.lengths))])
    told = rf"^block_size: out of memory on a single example of {LONGEST} tokens in 3 views; lower --views, shorten"
    with pytest.raises(InvalidArgument, match=told):
        summed(model, OwnViews(model, VIEWS), longest, 0.3)


def _rank(rank: int, gather: Callable[[Tensor], Tensor], draws: Sequence[UnitDraw]) -> list[Tensor]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    model = model_of("LoRA")
    how: dict[str, Any] = {"gather": gather, "rank": rank, "world_size": 2, "own": shapes(budget=90)}
    return [summed(model, OwnViews(model, VIEWS), draw, 0.3, **how)[0] for draw in draws]


def test_two_ranks_find_the_sum_of_one() -> None:
    draws = list(DRAWS.values())
    one, other = run_processes(2, _rank, draws)
    model = model_of("LoRA")
    for draw, first, second in zip(draws, one, other, strict=True):
        assert torch.equal(first, second)
        alone, _, _ = summed(model, OwnViews(model, VIEWS), draw, 0.3)
        assert (first - alone).norm() < 1e-6 * alone.norm()
