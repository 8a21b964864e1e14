"""Runs with noise bands: what one row moves, the noise on sums over ranks, and what launches cost together."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import GaussianNoise, InvalidArgument, Keystream, Ledger, PoissonSampler, PrivacyConfig, PrivateStep
from dptune.accounting import Spend, compose
from dptune.clipping_styles import Adaptive
from dptune.correlated_noise import CorrelatedNoise
from dptune.ledger import LEDGER_NAME
from dptune.mechanism import ROUNDING
from dptune.report.statement import state_privacy
from dptune.run.plan import RunPlan, make_plan
from dptune.run.session import PrivateRun, SavedRun
from dptune.run.settings import PrivacySettings
from dptune.sharding import shard
from dptune.units.batches import AuthorSampler
from tests.processes import run_processes
from tests.ranks import run_ranks

CONFIG = PrivacyConfig(
    num_examples=40, expected_batch_size=10, steps=9, clip_norm=2.0, noise_multiplier=1.0, delta=1e-3, noise_bands=3
)
Q = CONFIG.sampling_probability


def a_sampler(config: PrivacyConfig = CONFIG, keystream: Keystream | None = None) -> PoissonSampler:
    return PoissonSampler(config.num_examples, config.sampling_probability, keystream, noise_bands=config.noise_bands)


def key(seed: object) -> Keystream:
    return Keystream.for_tests(f"bands {seed}")


def lines(folder: Path) -> Any:
    return [json.loads(line) for line in (folder / LEDGER_NAME).read_text().splitlines()]


# --- what one row moves ---


def trajectory(folder: Path, config: PrivacyConfig, without: int | None) -> tuple[np.ndarray, list[int]]:
    """(the released sums [T, P] of all steps; the steps that drew row 0), always under the same keys and weights."""
    torch.manual_seed(0)
    model, rows = nn.Linear(6, 1), torch.randn(config.num_examples, 6) * 9
    sampler, released, drawn = a_sampler(config, key("draws")), [], []
    noise, ledger = GaussianNoise(7, key("noise")), Ledger(folder / f"{without}.jsonl")
    with PrivateStep(model, config, ledger=ledger, sampler=sampler, noise=noise) as step:
        for number in range(config.steps):
            draw = sampler.draw()
            losses = model(rows[draw])[:, 0] * torch.from_numpy(draw != without)
            step.backward(losses, items=draw)
            step.finish()
            grads = [parameter.grad for parameter in model.parameters()]
            released.append(torch.cat([grad.flatten() for grad in grads if grad is not None]).double())
            drawn += [number] if 0 in draw else []
    return torch.stack(released).numpy() * config.divisor, drawn


@pytest.mark.parametrize("expected", [13.0, 10.0])
def test_a_row_moves_one_column_of_length_c_in_each_turn(expected: float, tmp_path: Path) -> None:
    """Little noise, so that its grid is fine; it is the same in both runs."""
    config = replace(CONFIG, noise_multiplier=1e-3, expected_batch_size=expected)
    (with_it, turns), (without, _) = (trajectory(tmp_path, config, row) for row in (None, 0))
    moved, bands = with_it - without, config.noise_bands
    grid = config.grid() * 7**0.5 + 1e-5
    assert set(np.flatnonzero(np.linalg.norm(moved, axis=1) > grid)) == set(turns)
    assert 1 <= len(turns) <= -(-config.steps // bands)
    assert all(later - earlier >= bands for earlier, later in pairwise(turns))
    released = config.bands.matrix(config.steps) @ moved
    for turn in turns:
        of_turn = released[turn : turn + bands]
        assert np.linalg.norm(of_turn) <= config.clip_norm * (1 + ROUNDING) + grid
        released[turn : turn + bands] = 0
    assert np.abs(released).max() < grid, "nothing outside its turns"


# --- noise on sums over ranks ---


def noise_alone(world_size: int, folder: Path) -> np.ndarray:
    """The noisy sums of 6 steps without examples, [6, P], as all ranks have them."""

    def work(rank: int, gather: Any) -> Tensor:
        model = nn.Linear(50_000, 1, bias=False)
        more = {"rank": rank, "world_size": world_size, "gather": gather}
        found, ledger = [], Ledger(folder / LEDGER_NAME) if rank == 0 else None
        with PrivateStep(model, CONFIG, ledger=ledger, **more) as step:
            for _ in range(6):
                step.finish()
                assert model.weight.grad is not None
                found.append(model.weight.grad[0].double() * CONFIG.divisor)
                std = model.weight.grad.std().item()
                assert step.gradient_noise_std() == pytest.approx(std, rel=0.02)
        return torch.stack(found)

    of_ranks = run_ranks(world_size, work)
    assert all(torch.equal(one, of_ranks[0]) for one in of_ranks)
    return of_ranks[0].numpy()


def within_covariance(found: np.ndarray) -> bool:
    """Whether noise [T, P] has the covariance over steps of the configuration's mechanism."""
    inverse = np.linalg.inv(CONFIG.bands.matrix(len(found)))
    expected = inverse @ inverse.T * CONFIG.noise_std**2
    spread = np.sqrt((expected**2 + np.outer(expected.diagonal(), expected.diagonal())) / found.shape[1])
    return bool((np.abs(np.cov(found) - expected) < 6 * spread).all())


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_noise_of_all_ranks_together_is_that_of_the_mechanism(world_size: int, tmp_path: Path) -> None:
    assert within_covariance(noise_alone(world_size, tmp_path))
    assert {line["block"] for line in lines(tmp_path)} == {1}


def sharded_noise(rank: int, gather: Any, folder: Path) -> np.ndarray:
    model = nn.Sequential(nn.Sequential(nn.Linear(300, 200, bias=False))).requires_grad_(False)
    shard(model, [model[0]], device=torch.device("cpu"))
    model.requires_grad_(True)
    ledger = Ledger(folder / LEDGER_NAME) if rank == 0 else None
    found = []
    with PrivateStep(model, CONFIG, ledger=ledger, rank=rank, world_size=2, gather=gather) as step:
        for _ in range(5):
            step.finish()
            grad: Any = next(model.parameters()).grad
            found.append(grad.full_tensor().flatten().double() * CONFIG.divisor)
    return torch.stack(found).numpy()


def test_the_noise_on_shards_is_that_of_the_mechanism(tmp_path: Path) -> None:
    first, second = run_processes(2, sharded_noise, tmp_path)
    assert np.array_equal(first, second)
    assert within_covariance(first)
    halves = np.split(first, 2, axis=1)
    assert np.abs(np.corrcoef(*halves)[:5, 5:]).max() < 6 / halves[0].shape[1] ** 0.5, "ranks share no noise"


def test_noise_is_kept_in_units_of_the_clip_norm_where_that_changes(tmp_path: Path) -> None:
    """y_t is multiplied by the C of step t, and so is what it takes back of earlier steps, whatever C they had."""
    config = replace(CONFIG, clipping=Adaptive(quantile=0.9, learning_rate=1.0, count_noise=0.6))
    model, clip_norms, released = nn.Linear(50, 1, bias=False), [], []
    with GaussianNoise(51, key("adaptive")) as independent:  # one value is for the count of unclipped examples
        z = torch.stack([independent.take() for _ in range(6)]).numpy()[:, :50]
    noise, ledger = GaussianNoise(51, key("adaptive")), Ledger(tmp_path / LEDGER_NAME)
    with PrivateStep(model, config, ledger=ledger, noise=noise) as step:
        for _ in range(6):
            clip_norms.append(step.clip_norm)
            step.finish()
            assert model.weight.grad is not None
            released.append(model.weight.grad[0].double().numpy() * config.divisor)
    assert all(later > 1.2 * earlier for earlier, later in pairwise(clip_norms)), "no example is counted, so C grows"
    y = np.stack(released) / [[config.noise_std_per_rank(1, clip_norm)] for clip_norm in clip_norms]
    grid = config.grid() / config.noise_std
    assert np.abs(config.bands.matrix(6) @ y - z).max() < 6 * grid + 1e-5


# --- steps and their sampler ---


def take_steps(step: PrivateStep, sampler: PoissonSampler, count: int, model: nn.Module) -> None:
    for _ in range(count):
        draw = sampler.draw()
        step.backward(model(torch.ones(len(draw) + 1, 3))[:, 0], items=draw)
        step.finish()


def a_step(folder: Path, sampler: PoissonSampler, model: nn.Module, config: PrivacyConfig = CONFIG) -> PrivateStep:
    return PrivateStep(model, config, ledger=Ledger(folder / LEDGER_NAME), sampler=sampler)


def test_a_sampler_serves_one_step_from_its_first_draw(tmp_path: Path) -> None:
    """Otherwise a row could have two turns closer together than its noise allows."""
    sampler, model = a_sampler(), nn.Linear(3, 1)
    with a_step(tmp_path, sampler, model) as step:
        take_steps(step, sampler, 2, model)
    drawn = a_sampler()
    drawn.draw()
    for used in (sampler, drawn):
        with pytest.raises(RuntimeError, match="each PrivateStep needs a new sampler"):
            a_step(tmp_path, used, model)
    with pytest.raises(InvalidArgument, match=r"^sampler=PoissonSampler: draws in 1 groups, .* 3 noise bands"):
        a_step(tmp_path, PoissonSampler(40, Q), model)
    with pytest.raises(InvalidArgument, match=r"^sampler=PoissonSampler: draws in 3 groups, .* 1 noise bands"):
        a_step(tmp_path, a_sampler(), model, replace(CONFIG, noise_bands=1))


def test_two_steps_on_one_ledger_are_two_blocks(tmp_path: Path) -> None:
    for _ in range(2):
        sampler, model = a_sampler(), nn.Linear(3, 1)
        with a_step(tmp_path, sampler, model) as step:
            take_steps(step, sampler, 4, model)
            assert isinstance(step.noise, CorrelatedNoise)
            assert step.state_dict() == {"clip_norm": 2.0}, "no noise"
            statement = state_privacy(CONFIG, Ledger(tmp_path / LEDGER_NAME), step.noise, privacy_unit="one row")
    ledger = Ledger(tmp_path / LEDGER_NAME)
    assert [(line["noise_bands"], line["block"]) for line in lines(tmp_path)] == [(3, 1)] * 4 + [(3, 2)] * 4
    assert (ledger.steps, ledger.spends) == (8, [Spend(1.0, 3 * Q, 2 + 2)]), "not 3, as 8 steps of one launch"
    assert statement.epsilon == compose(ledger.spends, delta=1e-3)
    assert (statement.noise_bands, statement.sampler) == (3, "Poisson, cyclic: 3 groups of examples take turns")


def test_authors_take_turns_with_all_their_rows() -> None:
    authors = PoissonSampler(30, 0.3, key("authors"), noise_bands=2)
    sampler = AuthorSampler(authors, [np.arange(3 * one, 3 * one + 3) for one in range(30)], 2, mean=True)
    assert authors._groups is not None
    for turn in range(8):
        drawn = sampler.draw()
        assert drawn.numbers is not None
        assert set(authors._groups[drawn.numbers]) == {turn % 2}
        assert [set(rows // 3) for rows in drawn.rows] == [{author} for author in drawn.numbers]


# --- launches ---


def a_plan(**settings: Any) -> RunPlan:
    given = {"target_epsilon": 3.0, "delta": 1e-3, "noise_bands": 2} | settings
    return make_plan(PrivacySettings(**given), num_examples=100, batch=10, steps=9)


def launched(plan: RunPlan, folder: Path, steps: int, saved: SavedRun | None = None) -> PrivateRun:
    """A launch that takes so many steps of the run."""
    run, model = PrivateRun(plan, folder, resume_from=saved), nn.Linear(3, 1)
    sampler = run.sampler()
    run.prepare(model)
    with run:
        for _ in range(steps):
            run.begin_step()
            draw = sampler.draw()
            run.backward(model(torch.ones(len(draw) + 1, 3))[:, 0], items=draw)
            run.finish_step()
    return run


def saved_at(run: PrivateRun, step: int, folder: Path) -> SavedRun:
    copy = folder / f"copy-{step}"
    content = (run.folder / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    copy.write_bytes(b"".join(content[:step]))
    return SavedRun(step, copy, step, run.identity)


def test_a_crashed_run_counts_its_turns_by_launch_and_never_exceeds_the_target(tmp_path: Path) -> None:
    plan = a_plan()
    assert plan.privacy is not None
    first = launched(plan, tmp_path / "run", 5)
    assert first.last == 9, "one launch takes every step"
    assert compose([plan.privacy.spend(9)], delta=1e-3) <= 3
    saved = saved_at(first, 4, tmp_path)
    second = launched(plan, tmp_path / "run", 0, saved)
    assert second.last == 8, "3 of 5 turns are gone, and the 2 that are left are 4 steps"
    second = launched(plan, tmp_path / "run", 4, saved)
    ledger = Ledger(tmp_path / "run" / LEDGER_NAME)
    assert (ledger.steps, ledger.turns) == (9, 3 + 2)
    assert {line["block"] for line in lines(tmp_path / "run")} == {1, 2}
    spent = second.statement().epsilon
    assert spent is not None
    assert spent == compose([plan.privacy.spend(10)], delta=1e-3) <= 3
    assert second.epsilon is not None
    assert spent <= second.epsilon <= 3.05
    assert ledger.spends_after(1)[0].steps == 3 + 3
    assert compose(ledger.spends_after(1), delta=1e-3) > 3


def test_unused_steps_count_as_the_rest_of_the_launch(tmp_path: Path) -> None:
    run = launched(a_plan(), tmp_path / "run", 3)
    config = run.plan.privacy
    assert config is not None
    assert run.statement().epsilon == config.planned_epsilon() <= 3


def test_launches_of_whole_turns_lose_no_step(tmp_path: Path) -> None:
    plan = a_plan()
    first = launched(plan, tmp_path / "run", 4)
    assert launched(plan, tmp_path / "run", 5, saved_at(first, 4, tmp_path)).completed == 9


def test_a_resumed_run_deals_new_groups_and_has_the_bands_it_began_with(tmp_path: Path) -> None:
    plan = a_plan()
    first = launched(plan, tmp_path / "run", 4)
    saved = saved_at(first, 4, tmp_path)
    second = launched(plan, tmp_path / "run", 0, saved)
    groups = [np.array(run.sampler()._groups) for run in (first, second)]
    assert (groups[0] != groups[1]).any()
    with pytest.raises(InvalidArgument, match="noise_bands was 2 in the checkpoint and is absent now"):
        PrivateRun(a_plan(noise_bands=1), tmp_path / "run", resume_from=saved)
