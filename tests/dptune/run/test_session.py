"""Draws and noise are secret by default: the draw is shared by all ranks, the noise is not. A test seed resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dptune import GaussianNoise, InvalidArgument, Ledger, PrivacyConfig
from dptune.accounting import Cut, Spend, compose
from dptune.accounting.rounding import rounded_up
from dptune.bands import Bands
from dptune.budget import Budget
from dptune.ledger import LEDGER_NAME
from dptune.ranks import Gather, Ranks
from dptune.run import session
from dptune.run.identity import mechanism_identity
from dptune.run.plan import RunPlan, make_plan, spends_to_come
from dptune.run.plan_lines import describe_register
from dptune.run.session import PrivateRun, SavedRun
from dptune.run.settings import PrivacySettings
from dptune.sampling import Parts, PoissonSampler
from dptune.units.unit import PrivacyUnit, group_by_author
from tests.processes import run_processes

SIZE = 1000
CONFIG = PrivacyConfig(
    num_examples=500, expected_batch_size=100.0, steps=9, clip_norm=1.0, noise_multiplier=1.0, delta=1e-4
)


def plan(test_seed: int | None = None, *, private: bool = True) -> RunPlan:
    return RunPlan(CONFIG if private else None, 500, 100.0, 9, test_seed=test_seed)


def a_run(folder: Path, chosen: RunPlan, *, completed: int = 0, ranks: Ranks | None = None) -> PrivateRun:
    """A run in a new folder that has completed some steps, with an empty ledger."""
    folder = folder / f"run-{len(list(folder.iterdir()))}"
    folder.mkdir()
    (folder / "copy").touch()
    saved = SavedRun(completed, folder / "copy", 0, mechanism_identity(chosen)) if completed else None
    return PrivateRun(chosen, folder, ranks or Ranks(), resume_from=saved)


def draws(folder: Path, *, test_seed: int | None, completed: int = 0, count: int = 6) -> list[list[int]]:
    sampler = a_run(folder, plan(test_seed, private=False), completed=completed).sampler()
    return [sampler.draw().tolist() for _ in range(count)]


def noise_of(folder: Path, *, test_seed: int | None, rank: int = 0, completed: int = 0) -> GaussianNoise:
    ranks = Ranks(rank, rank + 1, gather=lambda values: values, broadcast=lambda value: value)
    chosen = plan(test_seed)
    run = a_run(folder, chosen, completed=completed)
    run.sampler()
    run.ranks = ranks  # as rank 0 opened it
    run.prepare(nn.Linear(SIZE - 1, 1))
    assert run.step is not None
    assert run.step.noise is not None
    return run.step.noise


def noises(folder: Path, *, test_seed: int | None, rank: int = 0, completed: int = 0, count: int = 6) -> torch.Tensor:
    with noise_of(folder, test_seed=test_seed, rank=rank, completed=completed) as noise:
        return torch.stack([noise.take() for _ in range(count)])


def test_two_runs_differ_whatever_the_seeds(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        found.append((draws(tmp_path, test_seed=None), noises(tmp_path, test_seed=None)))
    (first, noise), (second, other) = found
    assert not any(one == two for one, two in zip(first, second, strict=True))
    assert not (noise == other).all(1).any()


def test_a_run_is_keyed_in_secret_and_a_test_seed_is_not(tmp_path: Path) -> None:
    for seed, secret in ((None, True), (7, False)):
        assert a_run(tmp_path, plan(seed, private=False)).sampler().keystream.secret is secret
        with noise_of(tmp_path, test_seed=seed) as noise:
            assert noise.keystream.secret is secret
            assert ("FIXED key" in noise.source) is not secret


def test_draws_are_of_the_plan(tmp_path: Path) -> None:
    sampler = a_run(tmp_path, plan(1, private=False)).sampler()
    assert (sampler.num_examples, sampler.sampling_probability) == (500, 0.2)
    assert 60 < len(sampler.draw()) < 140


def test_a_test_seed_repeats_and_another_does_not(tmp_path: Path) -> None:
    assert draws(tmp_path, test_seed=3) == draws(tmp_path, test_seed=3)
    assert draws(tmp_path, test_seed=3) != draws(tmp_path, test_seed=4)
    assert torch.equal(noises(tmp_path, test_seed=3), noises(tmp_path, test_seed=3))
    assert not torch.equal(noises(tmp_path, test_seed=3), noises(tmp_path, test_seed=4))
    assert draws(tmp_path, test_seed=0) == draws(tmp_path, test_seed=0)  # zero is a valid seed


@pytest.mark.parametrize("completed", [1, 2, 5])
def test_a_resumed_run_with_a_test_seed_goes_on_where_it_was(completed: int, tmp_path: Path) -> None:
    assert (
        draws(tmp_path, test_seed=3, completed=completed, count=6 - completed)
        == draws(tmp_path, test_seed=3)[completed:]
    )
    for rank in (0, 1):
        resumed = noises(tmp_path, test_seed=3, rank=rank, completed=completed, count=6 - completed)
        assert torch.equal(resumed, noises(tmp_path, test_seed=3, rank=rank)[completed:])


@pytest.mark.parametrize("test_seed", [None, 3])
def test_noise_differs_between_ranks_and_steps(test_seed: int | None, tmp_path: Path) -> None:
    vectors = torch.cat([noises(tmp_path, test_seed=test_seed, rank=rank, count=3) for rank in range(3)]).double()
    correlations = torch.corrcoef(vectors) - torch.eye(len(vectors))
    assert correlations.abs().max() < 6 / SIZE**0.5
    assert abs(vectors.square().mean() - 1) < 6 * (2 / vectors.numel()) ** 0.5


def _on_a_rank(rank: int, gather: Gather, folder: Path) -> dict[str, Any]:
    def broadcast(value: object) -> object:
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    folder = folder / str(rank)
    folder.mkdir()
    ranks = Ranks(rank, 2, gather=gather, broadcast=broadcast)
    found = []
    for seed in (None, 3):
        sampler = a_run(folder, plan(seed, private=False), ranks=ranks).sampler()
        found.append([sampler.draw().tolist() for _ in range(2)])
    noise = [noises(folder, test_seed=seed, rank=rank, count=1) for seed in (None, 3)]
    return {"draws": found, "noise": noise}


class OtherMain(Ranks):
    """One process whose main one is a machine that computes other bands."""

    def from_main(self, work: Callable[[], Any]) -> Any:
        value = work()
        return Bands((0.8, 0.6)) if isinstance(value, Bands) else value


def test_every_rank_correlates_its_noise_with_the_main_ones_bands(tmp_path: Path) -> None:
    settings = PrivacySettings(noise_multiplier=1.0, delta=1e-4, noise_bands=2)
    chosen, model = make_plan(settings, num_examples=500, batch=100, steps=9), nn.Linear(3, 2)
    stds = []
    for ranks in (Ranks(), OtherMain()):
        run = a_run(tmp_path, chosen, ranks=ranks)
        run.prepare(model)
        with run:
            for _ in range(2):
                fed(run, model)
                run.finish_step()
            stds.append(run.gradient_noise_std())
    assert chosen.privacy is not None
    assert stds[1] / stds[0] == pytest.approx(Bands((0.8, 0.6)).std(2) / chosen.privacy.bands.std(2))
    assert stds[1] > 1.1 * stds[0]


def test_ranks_share_their_draws_and_not_their_noise(tmp_path: Path) -> None:
    one, other = run_processes(2, _on_a_rank, tmp_path)
    assert one["draws"] == other["draws"]
    assert one["draws"][1] == draws(tmp_path, test_seed=3, count=2)
    assert not any(torch.equal(*pair) for pair in zip(one["noise"], other["noise"], strict=True))


# --- the steps ---


def trained(folder: Path, chosen: RunPlan, steps: int, **how: Any) -> PrivateRun:
    """A run that has taken some steps on a model of one layer."""
    run, model = a_run(folder, chosen, **how), nn.Linear(3, 2)
    run.prepare(model)
    with run:
        for _ in range(steps):
            run.begin_step()
            fed(run, model)
            run.finish_step()
    return run


def fed(run: PrivateRun, model: nn.Module) -> None:
    """The gradients of a new draw."""
    drawn = run.sampler().draw()
    run.backward(model(torch.ones(len(drawn), 3)).sum(1), items=drawn)


def test_a_step_is_counted_recorded_and_stated(tmp_path: Path) -> None:
    run = trained(tmp_path, plan(), 3)
    assert run.completed == Ledger(run.folder / LEDGER_NAME).steps == 3
    statement = run.statement(planned=False)
    assert (statement.steps, statement.repeated_steps, statement.guarantee) == (3, 0, "dp")
    assert statement.epsilon == Ledger(run.folder / LEDGER_NAME).epsilon(1e-4)
    assert run.epsilon is not None
    assert run.epsilon >= statement.epsilon
    assert "cryptography" in statement.versions


def test_what_is_shown_in_between_never_exceeds_the_target(tmp_path: Path) -> None:
    tiny = make_plan(PrivacySettings(target_epsilon=0.001, delta=1e-3), num_examples=64, batch=16, steps=20)
    run = trained(tmp_path, tiny, 20)
    statement = run.statement()
    assert statement.epsilon is not None
    assert run.ledger is not None
    assert run.ledger.running_epsilon(1e-3) > 0.001, "the coarse grid says more"
    assert statement.epsilon <= 0.001 == run.epsilon


def test_a_run_with_hardly_any_noise_ends_with_a_statement(tmp_path: Path) -> None:
    """It trained to its end, and then an assertion stopped it before anything was saved."""
    useless = dataclasses.replace(CONFIG, noise_multiplier=1e-200)
    run = trained(tmp_path, RunPlan(useless, 500, 100.0, 9), 2)
    assert run.epsilon is None
    assert run.ledger is not None
    statement = run.statement()
    assert (statement.guarantee, statement.epsilon, statement.steps) == ("none", None, 2)
    assert session.describe_end(run, statement)[0].endswith("NONE: the noise is so small that epsilon is infinite")


def test_a_step_beyond_the_last_one_is_neither_begun_nor_released(tmp_path: Path) -> None:
    run, model = a_run(tmp_path, plan()), nn.Linear(3, 2)
    run.last = 1
    run.prepare(model)
    with run:
        run.begin_step()
        fed(run, model)
        run.finish_step()
        with pytest.raises(RuntimeError, match=r"step 2 is beyond the last step that the budget allows, 1"):
            run.begin_step()
        model.weight.grad = None
        fed(run, model)
        with pytest.raises(RuntimeError, match=r"step 2 is beyond the last step that the budget allows, 1"):
            run.finish_step()
        assert model.weight.grad is None
    assert Ledger(run.folder / LEDGER_NAME).steps == 1


def test_steps_that_an_earlier_launch_planned_count_where_a_later_one_plans_fewer(tmp_path: Path) -> None:
    """Who has seen the run's steps may choose how many follow, so a bound for fewer would not hold."""
    run, model = a_run(tmp_path, plan()), nn.Linear(3, 2)
    run.prepare(model)
    with run:
        fed(run, model)
        run.finish_step()
        state = run.mechanism_state()
    planned = run.statement()
    copy = tmp_path / "copy"
    copy.write_bytes((run.folder / LEDGER_NAME).read_bytes())
    fewer = dataclasses.replace(plan(), privacy=dataclasses.replace(CONFIG, steps=2), steps=2)
    resumed = PrivateRun(fewer, run.folder, resume_from=SavedRun(1, copy, 1, run.identity, state))
    resumed.prepare(model)
    with resumed:
        fed(resumed, model)
        resumed.finish_step()
        assert resumed.mechanism_state() == state
    statement = resumed.statement()
    assert (resumed.completed, statement.unused_steps) == (2, plan().steps - 2)
    assert statement.epsilon == planned.epsilon


def test_dropouts_masks_are_drawn_before_each_step_and_forgotten_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(session, "new_randomness", lambda *step, test_seed: calls.append((*step, test_seed)))
    monkeypatch.setattr(session, "forget_randomness", lambda: calls.append("forgotten"))
    trained(tmp_path, plan(5), 2)
    assert calls == [(0, 1, 5), "forgotten", (0, 2, 5), "forgotten"]


def test_ranks_are_compared_every_ten_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    monkeypatch.setattr(Ranks, "require_equal", lambda _, parameters: compared.append(len(parameters)))
    trained(tmp_path, RunPlan(None, 500, 100.0, 21), 21)
    assert compared == [2, 2, 2]


def test_hooks_and_noise_end_with_the_run_also_after_an_error(tmp_path: Path) -> None:
    run, model = a_run(tmp_path, plan()), nn.Linear(3, 2)
    run.prepare(model)
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert not model._forward_hooks
    assert model.weight.requires_grad
    with pytest.raises(RuntimeError, match="not open"):
        run.backward(torch.ones(1))


def test_a_run_without_privacy_has_no_ledger_and_guarantees_nothing(tmp_path: Path) -> None:
    run = trained(tmp_path, RunPlan(None, 500, 100.0, 9), 2)
    assert not (run.folder / LEDGER_NAME).exists()
    assert (run.epsilon, run.clip_norm) == (None, None)
    statement = run.statement()
    assert (statement.guarantee, statement.epsilon, statement.steps) == ("none", None, 2)


def test_a_folder_with_a_run_and_another_runs_checkpoint_are_refused(tmp_path: Path) -> None:
    run = trained(tmp_path, plan(), 1)
    with pytest.raises(InvalidArgument, match=r"^run_folder=.*holds a run already \(ledger.jsonl\)"):
        PrivateRun(plan(), run.folder)
    copy = tmp_path / "copy"
    copy.write_bytes((run.folder / LEDGER_NAME).read_bytes())
    other = SavedRun(1, copy, 1, run.identity | {"noise_multiplier": 2.0})
    with pytest.raises(InvalidArgument, match=r"noise_multiplier was 2\.0 in the checkpoint and is 1\.0 now"):
        PrivateRun(plan(), run.folder, resume_from=other)
    (run.folder / LEDGER_NAME).write_text("")
    with pytest.raises(InvalidArgument, match="has 0 lines, but the checkpoint already has 1"):
        PrivateRun(plan(), run.folder, resume_from=SavedRun(1, copy, 1, run.identity))


def test_a_plan_for_authors_draws_authors_and_needs_to_know_them(tmp_path: Path) -> None:
    unit = PrivacyUnit("user", examples=2)
    run = a_run(tmp_path, RunPlan(None, 3, 3, 1, unit, test_seed=1))
    authors = group_by_author(["a", "a", "a", "b", "c"])
    assert [len(rows) for rows in run.draws(authors).draw().rows] == [2, 1, 1]
    with pytest.raises(RuntimeError, match="without the column"):
        run.draws(None)
    assert run.sampler().draw().tolist() == [0, 1, 2]


def test_a_plan_with_weights_draws_by_them_and_its_statement_says_so(tmp_path: Path) -> None:
    parts, settings = Parts((300, 200), (1.0, 4.0)), PrivacySettings(noise_multiplier=1.0, delta=1e-4)
    chosen = make_plan(settings, num_examples=500, batch=100, steps=9, parts=parts)
    run = trained(tmp_path, chosen, 2)
    sampler = run.sampler()
    assert isinstance(sampler, PoissonSampler)
    assert (sampler.parts, sampler.sampling_probability) == (parts, pytest.approx(100 / 275))
    with pytest.raises(InvalidArgument, match="parts"):
        PrivateRun(
            make_plan(settings, num_examples=500, batch=100, steps=9),
            run.folder,
            resume_from=SavedRun(2, run.folder / "copy", 0, run.identity),
        )
    assert run.ledger is not None
    assert {spend.sampling_probability for spend in run.ledger.spends} == {chosen.sampling_probability}
    plain = PrivateRun(make_plan(None, num_examples=500, batch=100, steps=9, parts=parts), tmp_path / "plain")
    for stated in (run.statement(), plain.statement()):
        assert (stated.parts, stated.sampling_probability) == (parts, chosen.sampling_probability)
        assert "with weights (300 with weight 1, 200 with weight 4; the sampling probability is" in stated.sampler


def limited(folder: Path, steps: int = 9, test_seed: int | None = None) -> RunPlan:
    """A plan with a register that allows 20 of its steps."""
    allowed = Spend(CONFIG.noise_multiplier, CONFIG.sampling_probability, 20)
    Budget(folder / "people.jsonl").set_limit(compose([allowed], delta=CONFIG.delta), CONFIG.delta)
    settings = PrivacySettings(noise_multiplier=1.0, delta=CONFIG.delta, register=str(folder / "people.jsonl"))
    return make_plan(settings, num_examples=500, batch=100, steps=steps, test_seed=test_seed)


def test_a_run_that_would_exceed_its_register_leaves_nothing_and_spends_nothing(tmp_path: Path) -> None:
    chosen = limited(tmp_path)
    for name in ("one", "two"):
        PrivateRun(chosen, tmp_path / name)
    with pytest.raises(InvalidArgument, match=r"register=.*with three it would be"):
        PrivateRun(chosen, tmp_path / "three")
    with pytest.raises(InvalidArgument, match=r"register=.*with three it would be"):
        describe_register(chosen, tmp_path / "three")
    assert not (tmp_path / "three" / LEDGER_NAME).exists()
    assert [stage.stage for stage in Budget(tmp_path / "people.jsonl").stages] == ["one", "two"]


def test_a_run_reserves_all_planned_steps_and_the_repeated_ones_when_it_resumes(tmp_path: Path) -> None:
    chosen = limited(tmp_path)
    run = trained(tmp_path, chosen, 3)
    (entry,) = Budget(tmp_path / "people.jsonl").stages
    assert sum(spend.steps for spend in entry.reserved) == 9
    copy = tmp_path / "copy"
    copy.write_bytes(b"".join((run.folder / LEDGER_NAME).read_bytes().splitlines(keepends=True)[:1]))
    saved = SavedRun(1, copy, 1, run.identity)
    PrivateRun(chosen, run.folder, resume_from=saved)
    (entry,) = Budget(tmp_path / "people.jsonl").stages
    assert sum(spend.steps for spend in entry.reserved) == 3 + 8


def test_a_run_with_a_register_resumes_only_with_one(tmp_path: Path) -> None:
    chosen = limited(tmp_path)
    run = trained(tmp_path, chosen, 1)
    saved = SavedRun(1, run.folder / LEDGER_NAME, 1, run.identity)
    without = replace(chosen, register=None)
    with pytest.raises(InvalidArgument, match="register was True in the checkpoint and is absent now"):
        PrivateRun(without, run.folder, resume_from=saved)


def test_a_plan_tells_what_its_register_leaves(tmp_path: Path) -> None:
    chosen = limited(tmp_path)
    (line,) = describe_register(chosen, tmp_path / "one")
    spent = compose(spends_to_come(chosen, 9), delta=CONFIG.delta)
    assert f"epsilon {rounded_up(spent)} of " in line
    assert describe_register(plan(), tmp_path / "one") == []
    assert not (tmp_path / "one").exists()


def test_a_plan_of_cut_draws_cuts_them_and_its_statement_says_so(tmp_path: Path) -> None:
    settings = PrivacySettings(noise_multiplier=1.0, delta=1e-4)
    chosen = make_plan(settings, num_examples=500, batch=100, steps=9, max_batch=104)
    run = trained(tmp_path, chosen, 2)
    assert run.sampler().max_batch == 104
    assert max(len(run.sampler().draw()) for _ in range(60)) == 104
    with pytest.raises(InvalidArgument, match="max_batch was 104 in the checkpoint and is absent now"):
        PrivateRun(
            make_plan(settings, num_examples=500, batch=100, steps=9),
            run.folder,
            resume_from=SavedRun(2, run.folder / "copy", 0, run.identity),
        )
    assert run.ledger is not None
    assert [spend.cut for spend in run.ledger.spends] == [Cut(104, 500)]
    plain = PrivateRun(make_plan(None, num_examples=500, batch=100, steps=9, max_batch=104), tmp_path / "plain")
    for stated in (run.statement(), plain.statement()):
        assert (stated.max_batch, stated.sampler) == (104, "Poisson, cut at 104 examples")
    assert run.statement(planned=False).epsilon == run.ledger.epsilon(1e-4)
    assert (run.statement().epsilon or 0) == pytest.approx(chosen.privacy.planned_epsilon())  # type: ignore[union-attr]
