"""Errors and interrupts at any place: no gradient is added twice, no two draws share a step, and no step is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import InvalidArgument, Ledger, PrivacyConfig, PrivateStep
from dptune.fed_items import FedItems
from dptune.per_example import HalfAdded, recorded
from dptune.per_example.uses import Outer
from dptune.sampling import PoissonSampler
from dptune.step_sums import WholeSum

ROWS, CLIP_NORM = 4, 1.0
LOST = "an earlier error left this step half done, so it is lost"


class Model(nn.Module):
    """Its layers are added as products, and its norm's weights as sums that are made first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(64, 300, bias=False), nn.LayerNorm(300), nn.Linear(300, 300)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, rows_BN: Tensor) -> Tensor:
        losses: Tensor = self.last(self.norm(self.first(rows_BN))).square().sum(1)
        return losses


class Run:
    """A step in which every draw holds all rows, and its hardly noisy sum."""

    def __init__(self, folder: Path) -> None:
        config = PrivacyConfig(
            num_examples=ROWS,
            expected_batch_size=ROWS,
            steps=9,
            clip_norm=CLIP_NORM,
            noise_multiplier=1e-3,
            delta=1e-3,
        )
        self.model, self.ledger, self.sampler = Model(), Ledger(folder / "ledger.jsonl"), PoissonSampler(ROWS, 1.0)
        self.step = PrivateStep(self.model, config, ledger=self.ledger, sampler=self.sampler)
        self.rows = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).repeat(ROWS, 1)

    def feed(self, drawn: np.ndarray) -> None:
        self.step.backward(self.model(self.rows[drawn]), items=drawn)

    def length(self) -> float:
        """Of the released sum, which `ROWS` equal rows bring to just about `ROWS` clip norms."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()) * ROWS  # type: ignore[union-attr]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    with made.step:
        yield made


def test_a_refused_step_is_finished_once_its_fault_is_fixed(run: Run) -> None:
    run.feed(run.sampler.draw())
    run.model.frozen.weight.grad = torch.ones(2, 2)
    with pytest.raises(InvalidArgument, match="has a gradient without clipping and noise"):
        run.step.finish()
    run.model.frozen.weight.grad = None
    run.step.finish()
    assert run.length() == pytest.approx(ROWS * CLIP_NORM, rel=0.2)
    assert run.ledger.steps == run.step.finished == 1


def test_a_loop_that_goes_on_after_a_refusal_cannot_put_two_draws_into_one_step(run: Run) -> None:
    run.feed(run.sampler.draw())
    run.model.frozen.weight.grad = torch.ones(2, 2)
    with pytest.raises(InvalidArgument):
        run.step.finish()
    run.model.frozen.weight.grad = None
    run.feed(run.sampler.draw())
    with pytest.raises(RuntimeError, match="the draw holds 4 examples, but the step was fed 8"):
        run.step.finish()
    with pytest.raises(RuntimeError, match=LOST):
        run.step.finish()
    assert run.ledger.steps == 0


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (recorded, "add_to_totals", 1),
        (Outer, "adding_weighted_sum", 2),
        (FedItems, "add", 1),
    ],
)
def test_an_interrupted_micro_batch_cannot_be_added_again(
    owner: Any, name: str, calls: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, count = getattr(owner, name), [0]

    def interrupted(*args: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return whole(*args)

    drawn = run.sampler.draw()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.feed(drawn)
    for again in (lambda: run.feed(drawn), run.step.finish):
        with pytest.raises(RuntimeError, match=LOST):
            again()
    assert run.ledger.steps == 0


def test_memory_that_runs_out_behind_the_first_product_ends_the_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU copies what it adds in another precision, so adding needs memory too."""

    def failing(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    drawn = run.sampler.draw()
    with monkeypatch.context() as patched:
        patched.setattr(recorded, "add_to_totals", failing)
        with pytest.raises(HalfAdded):
            run.feed(drawn)
    with pytest.raises(RuntimeError, match=LOST):
        run.feed(drawn)


def test_memory_that_runs_out_behind_the_first_sum_spoils_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gradients so large that each is summed alone."""
    size, whole, count = 1 << 17, recorded.add_to_totals, [0]

    def failing(*args: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("can't allocate memory")
        whole(*args)

    monkeypatch.setattr(recorded, "add_to_totals", failing)
    gradients = recorded.Recorded({name: [torch.ones(1, size)] for name in "ab"})
    totals, weights = ({name: make(one) for name in "ab"} for make, one in ((torch.zeros, size), (torch.ones, 1)))
    with pytest.raises(HalfAdded):
        gradients.add_weighted_sums(totals, weights)


def test_memory_that_runs_out_before_anything_is_added_allows_another_try(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Iterator[None]:
        raise RuntimeError("can't allocate memory")

    drawn = run.sampler.draw()
    with monkeypatch.context() as patched:
        patched.setattr(Outer, "adding_weighted_sum", failing)
        with pytest.raises(RuntimeError, match="allocate"):
            run.feed(drawn)
    run.feed(drawn[:2])
    run.feed(drawn[2:])
    run.step.finish()
    assert run.length() == pytest.approx(ROWS * CLIP_NORM, rel=0.2)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["taken", "over_ranks", "gradients"])
def test_an_error_after_the_draw_is_used_ends_the_run_so_none_of_its_steps_is_free(
    name: str, error: BaseException, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise error

    run.feed(run.sampler.draw())
    with monkeypatch.context() as patched:
        patched.setattr(WholeSum, name, failing)
        with pytest.raises(type(error)):
            run.step.finish()
    assert run.ledger.steps == (0 if name == "taken" else 1)
    assert run.step.finished == 0
    drawn = run.sampler.draw()
    for again in (lambda: run.feed(drawn), run.step.finish):
        with pytest.raises(RuntimeError, match=LOST):
            again()
