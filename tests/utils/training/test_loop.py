"""The training loop: what it calls, in which order, and what a stop and a resumed run leave of it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dptune import GaussianNoise, Keystream, Ledger, PoissonSampler, trainable_parameters
from dptune.averaging import NO_AVERAGE, Averaging
from dptune.iterate_average import IterateAverage
from dptune.ledger import LEDGER_NAME
from dptune.run import session
from dptune.run.checkpoint import load_checkpoint
from dptune.run.session import PrivateRun
from dptune.units.batches import rows_of
from tests.processes import run_processes
from tests.tasks import BATCH, COUNT, SEED, STEPS, TinyTask, micro_batches, pace, plan
from utils.cli.interruption import StopRequest
from utils.cli.launch import make_accelerator, ranks_of
from utils.training import loop as module
from utils.training.loop import End, Pace, TrainingLoop, describe_selection, describe_stop
from utils.training.micro_batches import MicroBatches
from utils.training.optimizers import UpdateSettings
from utils.training.resume import Checkpoints, saved_run
from utils.training.selection import HeldOutSelection


def the_loop(
    folder: Path, task: TinyTask, *, every: int = 0, how: Pace | None = None, step: int = 0, **planned: Any
) -> TrainingLoop:
    """A loop in a folder, from the beginning or from the checkpoint after `step` steps."""
    saved = load_checkpoint(folder / f"checkpoint-{step}") if step else None
    ranks = ranks_of(make_accelerator())
    run = PrivateRun(plan(**planned), folder, ranks, resume_from=saved_run(saved, folder), identity=task.identity)
    folder.mkdir(exist_ok=True)
    return TrainingLoop(run, task, micro_batches(task), Checkpoints(run, {}, every, None), how or pace())


def weights(task: TinyTask) -> Tensor:
    return flat(trainable_parameters(task.model))


def flat(parameters: Iterable[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


class Watched:
    """What a loop calls, by name and in order; micro-batches of one step are one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.drawn: list[list[int]] = []
        self.released: list[Tensor] = []  # gradients as they leave the step
        self.used: list[Tensor] = []  # gradients that the optimizer gets
        self._patch = patch
        for owner, name in ((PrivateRun, "begin_step"), (PrivateRun, "backward"), (PrivateRun, "finish_step")):
            self._note(owner, name)
        self._note(Checkpoints, "save")
        self._note(PoissonSampler, "draw")
        make = module.make_optimizer

        def made(settings: Any, parameters: Any, *rest: Any) -> Any:
            optimizer = make(settings, parameters, *rest)
            optimizer.register_step_pre_hook(lambda *_: self._update(parameters))
            return optimizer

        patch.setattr(module, "make_optimizer", made)

    def _note(self, owner: type, name: str) -> None:
        real = getattr(owner, name)

        def noted(this: Any, *args: Any, **how: Any) -> Any:
            self.calls.append(name)
            result = real(this, *args, **how)
            if name == "draw":
                self.drawn.append(rows_of(result).tolist())
            if name == "finish_step":
                self.released.append(torch.cat([p.grad.flatten() for p in this._parameters]))
            return result

        self._patch.setattr(owner, name, noted)

    def _update(self, parameters: Any) -> None:
        self.calls.append("update")
        self.used.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    @property
    def order(self) -> list[str]:
        return [name for name, _ in groupby(self.calls)]


ONE_STEP = ["begin_step", "draw", "backward", "finish_step", "update"]


def test_the_order_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    task = TinyTask(on_evaluate=lambda: watched.calls.append("evaluate"))
    end, rows = the_loop(tmp_path, task, every=2).train(None)
    assert end == End(STEPS, None)
    pair = [*ONE_STEP, *ONE_STEP, "evaluate", "save"]
    assert watched.order == ["evaluate", "save", *pair, *pair, *ONE_STEP, "evaluate", "save"]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4, 5]
    assert len(Ledger(tmp_path / LEDGER_NAME).content().splitlines()) == STEPS


def test_every_step_has_a_draw_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    _, rows = the_loop(tmp_path, TinyTask()).train(None)
    expected = PoissonSampler(COUNT, BATCH / COUNT, Keystream.for_tests(f"{SEED} sampling"))
    assert watched.drawn[:STEPS] == [expected.draw().tolist() for _ in range(STEPS)]
    assert [row["batch_drawn"] for row in rows[1:]] == [len(draw) for draw in watched.drawn[:STEPS]]


def test_the_optimizer_gets_the_gradient_as_it_was_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    the_loop(tmp_path, TinyTask()).train(None)
    assert len(watched.used) == STEPS
    assert all(torch.equal(*pair) for pair in zip(watched.released, watched.used, strict=True))


def test_a_private_gradient_is_never_clipped_again_and_a_plain_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = pace(plain_max_grad_norm=1e-3)
    with pytest.raises(RuntimeError, match="a private gradient is clipped already"):
        the_loop(tmp_path / "private", TinyTask(), how=how).train(None)
    watched = Watched(monkeypatch)
    the_loop(tmp_path / "plain", TinyTask(), how=how, private=False).train(None)
    assert [grad.norm().item() for grad in watched.used] == pytest.approx([1e-3] * STEPS, rel=1e-3)
    assert max(grad.norm().item() for grad in watched.released) > 1e-2


def test_rows_tell_the_epsilon_and_the_rate_of_each_step(tmp_path: Path) -> None:
    loop = the_loop(tmp_path, TinyTask(), test_seed=None)
    _, rows = loop.train(None)
    spent = [row["epsilon"] for row in rows[1:]]
    assert spent == sorted(set(spent))
    assert spent[-1] == loop.run.epsilon
    assert [row["clip_norm"] for row in rows[1:]] == [0.5] * STEPS
    assert rows[1]["learning_rate"] == 0.01
    assert rows[-1]["learning_rate"] < 0.002, "the rate of the update, not of the one after it"


def test_nothing_is_evaluated_before_the_first_step_if_so_told(tmp_path: Path) -> None:
    _, rows = the_loop(tmp_path, TinyTask(), how=pace(eval_at_start=False)).train(None)
    assert rows[0] == {"step": 0}


def test_dropout_is_on_in_steps_and_off_in_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[str, bool]] = []
    task = TinyTask(on_evaluate=lambda: modes.append(("evaluation", task.model.training)))
    backward = PrivateRun.backward

    def note(self: PrivateRun, losses: Tensor, **how: Any) -> Any:
        modes.append(("step", task.model.training))
        return backward(self, losses, **how)

    monkeypatch.setattr(PrivateRun, "backward", note)
    the_loop(tmp_path, task).train(None)
    assert set(modes) == {("evaluation", False), ("step", True)}


# --- a draw without any row ---

EMPTY = 3  # the step


def nobody_drawn_in(patch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`th draw from now has no row; the others are as they were."""
    draw, calls = PoissonSampler.draw, iter(range(1, 99))

    def drawn(self: PoissonSampler) -> np.ndarray:
        rows = draw(self)
        if next(calls) != number:
            return rows
        self._unused[-1] = (0, 0)
        return rows[:0]

    patch.setattr(PoissonSampler, "draw", drawn)


def noise_of(world_size: int, size: int, run: PrivateRun) -> Tensor:
    """What step EMPTY releases without a single example: the noise of all ranks, divided by the expected batch."""
    total, config = torch.zeros(size), run.plan.privacy
    assert config is not None
    for rank in range(world_size):
        with GaussianNoise(size, Keystream.for_tests(f"{SEED} noise of rank {rank}")) as noise:
            values = [noise.take() for _ in range(EMPTY)][-1]
        total += values * config.noise_std_per_rank(world_size)
    return total / BATCH


def with_an_empty_draw(rank: int, _gather: Any, folder: Path, world_size: int) -> dict[str, Any]:
    """One rank of a run in which nobody is drawn in step EMPTY: what the loop did in that step."""
    # The group is there already, and accelerate joins it; it only wants to see where one would meet.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    before: list[Tensor] = []
    task = TinyTask()
    with pytest.MonkeyPatch.context() as patch:
        nobody_drawn_in(patch, EMPTY)
        watched = Watched(patch)
        begin = PrivateRun.begin_step
        patch.setattr(PrivateRun, "begin_step", lambda run: before.append(flat(run._parameters)) or begin(run))
        loop = the_loop(folder, task)
        end, rows = loop.train(None)
    moved = (before[EMPTY] - before[EMPTY - 1]).abs()
    return {
        "end": end,
        "rows": rows,
        "ledger": Ledger(folder / LEDGER_NAME).steps if rank == 0 else None,
        "finished": watched.calls.count("finish_step"),
        "released": watched.released,
        "noise": noise_of(world_size, len(watched.released[0]), loop.run),
        "grid": loop.run.plan.privacy.grid() / BATCH,
        "moved": (moved > 0).double().mean().item(),
        "weights": weights(task),
    }


@pytest.fixture(scope="module", params=[1, 2])
def ranks_without_a_row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank of a run of one and of two did."""
    return run_processes(request.param, with_an_empty_draw, tmp_path_factory.mktemp("empty"), request.param)


def test_a_draw_without_any_row_is_a_step_and_a_line_of_the_ledger(ranks_without_a_row: list[dict[str, Any]]) -> None:
    for found in ranks_without_a_row:
        assert found["end"] == End(STEPS, None)
        assert found["finished"] == len(found["released"]) == STEPS
    main = ranks_without_a_row[0]
    assert main["ledger"] == STEPS
    row = main["rows"][EMPTY]
    assert (row["step"], row["batch_drawn"], row["tokens"]) == (EMPTY, 0, 0)
    assert "loss" not in row
    assert all(other["batch_drawn"] > 0 for other in main["rows"][1:] if other is not row)


def test_a_draw_without_any_row_releases_noise_alone_and_moves_the_parameters(
    ranks_without_a_row: list[dict[str, Any]],
) -> None:
    for found in ranks_without_a_row:
        torch.testing.assert_close(found["released"][EMPTY - 1], found["noise"], rtol=0, atol=2 * found["grid"])
        assert found["moved"] > 0.99
        assert torch.equal(found["weights"], ranks_without_a_row[0]["weights"])


def asked_in(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A stop is asked for in the middle of the `number`th step from now: some of its gradients are added already."""
    run, calls = MicroBatches.run, iter(range(1, 99))

    def stopped(self: MicroBatches, draw: Any, step: Any, losses: Any, stop: StopRequest) -> Any:
        seen = run(self, draw, step, losses, stop)
        if next(calls) != number:
            return seen
        stop.name = "SIGTERM"
        return None

    monkeypatch.setattr(MicroBatches, "run", stopped)


@pytest.mark.parametrize("every", [0, 3])
def test_a_stop_in_the_middle_releases_nothing_of_the_step_and_saves_the_one_before(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, task = Watched(monkeypatch), TinyTask()
    asked_in(monkeypatch, 3)
    loop = the_loop(tmp_path, task, every=every)
    end, rows = loop.train(None)
    assert end == End(2, "SIGTERM")
    assert (watched.order[-4:], len(watched.used)) == (["begin_step", "draw", "backward", "save"], 2)
    assert Ledger(tmp_path / LEDGER_NAME).steps == 2
    assert [row["step"] for row in rows] == [0, 1, 2]
    saved = load_checkpoint(tmp_path / "checkpoint-2")
    assert (saved.step, saved.ledger_steps) == (2, 2)
    told = describe_stop(end, STEPS, tmp_path)
    assert told.startswith(f"SIGTERM: stopped after step 2 of {STEPS}, saved in {tmp_path}; ")
    assert "--resume_from_checkpoint latest" in told


@pytest.mark.parametrize("private", [True, False])
def test_a_resumed_run_ends_to_the_bit_as_one_that_never_stopped(
    private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped, resumed = TinyTask(), TinyTask(), TinyTask()
    _, rows = the_loop(tmp_path / "whole", whole, private=private).train(None)
    with monkeypatch.context() as patch:
        asked_in(patch, 3)
        the_loop(tmp_path / "stopped", stopped, private=private).train(None)
    again = the_loop(tmp_path / "stopped", resumed, step=2, private=private)
    end, resumed_rows = again.train(load_checkpoint(tmp_path / "stopped" / "checkpoint-2"))
    assert end == End(STEPS, None)
    assert torch.equal(weights(whole), weights(resumed))
    changing = {"seconds"}
    assert [{name: row[name] for name in row.keys() - changing} for row in rows] == [
        {name: row[name] for name in row.keys() - changing} for row in resumed_rows
    ]


def test_a_run_whose_budget_is_spent_ends_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "last_step", lambda *_: 2)
    end, rows = the_loop(tmp_path, TinyTask(), every=4).train(None)
    assert end == End(2, None)
    assert rows[-1]["eval_loss"] == 4.0
    assert (tmp_path / "checkpoint-2").is_dir()
    assert Ledger(tmp_path / LEDGER_NAME).steps == 2


def test_an_error_takes_the_hooks_off(tmp_path: Path) -> None:
    task = TinyTask()

    def fail() -> None:
        raise ZeroDivisionError

    task.on_evaluate = fail
    with pytest.raises(ZeroDivisionError):
        the_loop(tmp_path, task).train(None)
    assert not any(part._forward_hooks for part in task.model.modules())
    assert trainable_parameters(task.model)


# --- what held-out rows decide ---

LOSSES = {0: 1.0, 1: 4.0, 2: 3.0, 3: 3.5, 4: 3.6, 5: 2.0}  # by step; what is measured before the first does not count
STOPPING = {"eval_freq": 1, "selection": HeldOutSelection(patience=2, keep_best=True)}


def judged(monkeypatch: pytest.MonkeyPatch, watched: dict[int, Tensor] | None = None) -> TinyTask:
    """A task whose held-out loss after each step is that of LOSSES; notes the weights at each evaluation."""
    completed = [0]
    finish = PrivateRun.finish_step

    def count(self: PrivateRun) -> None:
        finish(self)
        completed[0] = self.completed

    class Judged(TinyTask):
        def evaluate(self, _: MicroBatches) -> dict[str, Any]:
            if watched is not None:
                watched[completed[0]] = flat(adapter_weights(self))
            return {"eval_loss": LOSSES[completed[0]]}

    monkeypatch.setattr(PrivateRun, "finish_step", count)
    return Judged()


def adapter_weights(task: TinyTask) -> list[nn.Parameter]:
    """Also while a step records, when none requires a gradient."""
    return [parameter for name, parameter in task.model.named_parameters() if ".lora." in name]


def test_training_ends_early_and_releases_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: dict[int, Tensor] = {}
    task = judged(monkeypatch, watched)
    loop = the_loop(tmp_path, task, every=10, how=pace(**STOPPING))
    end, rows = loop.train(None)
    assert end == End(4, None, released=2)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert torch.equal(weights(task), watched[2])
    assert Ledger(tmp_path / LEDGER_NAME).steps == 4
    told = " ".join(describe_selection(end, STEPS))
    assert "after step 4 of 5: the held-out loss no longer fell" in told
    assert "step 2, with the lowest held-out loss" in told
    assert describe_selection(End(STEPS, None), STEPS) == []


def test_epsilon_of_an_early_end_is_that_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = the_loop(tmp_path / "early", judged(monkeypatch), how=pace(**STOPPING), test_seed=None)
    early.train(None)
    whole = the_loop(tmp_path / "whole", TinyTask(), test_seed=None)
    whole.train(None)
    stated, planned = early.run.statement(), whole.run.statement()
    assert (stated.steps, stated.unused_steps, planned.unused_steps) == (4, 1, 0)
    assert stated.epsilon == planned.epsilon
    assert "unused steps           1, left out early" in " ".join(session.describe_end(early.run, stated))


@pytest.mark.parametrize("stopped_in", [4, None])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    stopped_in: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped in a step, or ended early and is resumed once more."""
    whole, resumed = judged(monkeypatch), judged(monkeypatch)
    the_loop(tmp_path / "whole", whole, how=pace(**STOPPING)).train(None)
    with monkeypatch.context() as patch:
        if stopped_in is not None:
            asked_in(patch, stopped_in)
        the_loop(tmp_path / "run", judged(patch), every=10, how=pace(**STOPPING)).train(None)
    step = 4 if stopped_in is None else stopped_in - 1
    again = the_loop(tmp_path / "run", resumed, step=step, every=10, how=pace(**STOPPING))
    end, _ = again.train(load_checkpoint(tmp_path / "run" / f"checkpoint-{step}"))
    assert end == End(4, None, released=2)
    assert torch.equal(weights(resumed), weights(whole))


def ending_early(_rank: int, _gather: Any, folder: Path) -> tuple[End, Tensor]:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.MonkeyPatch.context() as patch:
        task = judged(patch)
        end, _ = the_loop(folder, task, how=pace(**STOPPING)).train(None)
    return end, weights(task)


def test_two_ranks_end_together_with_the_same_weights(tmp_path: Path) -> None:
    (one, first), (other, second) = run_processes(2, ending_early, tmp_path / "run")
    assert one == other == End(4, None, released=2)
    assert torch.equal(first, second)


def test_something_may_look_at_the_model_after_each_step(tmp_path: Path) -> None:
    seen: list[tuple[int, float | None]] = []
    the_loop(tmp_path, TinyTask(), how=pace(after_step=lambda _, *found: seen.append(found)), test_seed=None).train(
        None
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert all(epsilon is not None and epsilon > 0 for _, epsilon in seen)


def test_warm_up_is_a_share_of_the_planned_steps(tmp_path: Path) -> None:
    updates = UpdateSettings("adamw", 0.01, 0.0, warmup_ratio=0.4)
    _, rows = the_loop(tmp_path, TinyTask(), how=Pace(updates, eval_freq=9)).train(None)
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx([0, 0.005, 0.01, 0.02 / 3, 0.01 / 3])


# --- averages of the weights ---

EMA, LAST = Averaging(ema=0.5), Averaging(average_last=0.5)  # the latter of steps 3 to 5


class Iterates:
    """The trained weights at the start of each step, and after the last."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        begin, add = PrivateRun.begin_step, IterateAverage.add
        patch.setattr(PrivateRun, "begin_step", lambda run: self._note(run._parameters) or begin(run))
        patch.setattr(IterateAverage, "add", lambda own, step: self._end(own, step) or add(own, step))

    def _note(self, parameters: Iterable[nn.Parameter]) -> None:
        self.seen.append(flat(parameters))

    def _end(self, average: IterateAverage, step: int) -> None:
        if step == STEPS:
            self._note(average._parameters.values())

    def averaged(self, averaging: Averaging, until: int = STEPS) -> Tensor:
        """The average after so many steps, from its definition."""
        found = self.seen[until].double()
        if averaging is LAST:
            return torch.stack(self.seen[3 : until + 1]).double().mean(0) if until >= 3 else found
        for number, iterate in enumerate(self.seen[1 : until + 1]):
            decay = min(0.5, (1 + number) / (10 + number)) if number else 0.0
            found = decay * found + (1 - decay) * iterate.double()
        return found


def averaging_run(folder: Path, averaging: Averaging, *, private: bool = True) -> tuple[Iterates, TinyTask, End, Any]:
    """(weights by step, the task after the run, how it ended, the weights that were evaluated and sampled from)."""
    evaluated: list[Tensor] = []
    task = TinyTask(on_evaluate=lambda: evaluated.append(flat(adapter_weights(task))))
    sampled: list[Tensor] = []
    how = pace(eval_freq=1, averaging=averaging, after_step=lambda *_: sampled.append(flat(adapter_weights(task))))
    with pytest.MonkeyPatch.context() as patch:
        iterates = Iterates(patch)
        end, _ = the_loop(folder, task, every=STEPS, how=how, private=private).train(None)
    return iterates, task, end, (evaluated, sampled)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("averaging", [EMA, LAST], ids=["exponential", "last"])
def test_gradients_are_taken_at_the_weights_and_all_else_at_their_average(
    averaging: Averaging, private: bool, tmp_path: Path
) -> None:
    plain, _, without, _ = averaging_run(tmp_path / "plain", NO_AVERAGE, private=private)
    iterates, task, end, (evaluated, sampled) = averaging_run(tmp_path / "run", averaging, private=private)
    assert len(iterates.seen) == len(plain.seen) == STEPS + 1
    assert all(torch.equal(*pair) for pair in zip(iterates.seen, plain.seen, strict=True)), "training is the same"
    assert torch.equal(evaluated[0], iterates.seen[0]), "before the first step"
    for step in range(1, STEPS + 1):
        expected = iterates.averaged(averaging, step)
        torch.testing.assert_close(evaluated[step].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(sampled[step - 1], evaluated[step])
    assert torch.equal(weights(task), evaluated[-1]), "the result"
    assert not torch.allclose(weights(task), iterates.seen[-1], rtol=1e-3)
    assert (without.average, end.average) == (None, averaging.in_words(STEPS, STEPS))
    assert f"released weights       {end.average}" in describe_selection(end, STEPS)


def test_a_checkpoint_holds_the_weights_and_their_average(tmp_path: Path) -> None:
    iterates, task, *_ = averaging_run(tmp_path, LAST)
    early, late = (load_checkpoint(tmp_path / f"checkpoint-{step}") for step in (0, STEPS))
    assert (early.averaged, early.average, late.averaged) == (0, {}, 3)
    saved = torch.cat([late.weights[name].flatten() for name in late.average])
    assert torch.equal(saved, iterates.seen[-1])
    assert torch.equal(torch.cat([tensor.flatten() for tensor in late.average.values()]), weights(task))


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("averaging", [EMA, LAST], ids=["exponential", "last"])
@pytest.mark.parametrize("stopped_in", [3, 5, None])
def test_a_resumed_run_ends_with_the_same_average_to_the_bit(
    averaging: Averaging, stopped_in: int | None, private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped in a step, or has ended and is resumed once more."""
    how, whole, resumed = pace(averaging=averaging), TinyTask(), TinyTask()
    the_loop(tmp_path / "whole", whole, how=how, private=private).train(None)
    with monkeypatch.context() as patch:
        if stopped_in is not None:
            asked_in(patch, stopped_in)
        the_loop(tmp_path / "run", TinyTask(), every=10, how=how, private=private).train(None)
    step = STEPS if stopped_in is None else stopped_in - 1
    again = the_loop(tmp_path / "run", resumed, step=step, every=10, how=how, private=private)
    end, _ = again.train(load_checkpoint(tmp_path / "run" / f"checkpoint-{step}"))
    assert torch.equal(weights(resumed), weights(whole))
    assert end.average == averaging.in_words(STEPS, STEPS)
    final = load_checkpoint(tmp_path / "run" / f"checkpoint-{STEPS}")
    assert not torch.equal(weights(whole), torch.cat([final.weights[name].flatten() for name in final.average]))


@pytest.mark.parametrize("averaging", [EMA, LAST], ids=["exponential", "last"])
def test_the_best_weights_are_those_that_were_evaluated(
    averaging: Averaging, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: dict[int, Tensor] = {}
    task, iterates = judged(monkeypatch, watched), Iterates(monkeypatch)
    end, _ = the_loop(tmp_path, task, every=10, how=pace(**STOPPING, averaging=averaging)).train(None)
    assert (end.completed, end.released, end.average) == (4, 2, averaging.in_words(STEPS, 2))
    assert torch.equal(weights(task), watched[2])
    assert torch.equal(weights(task), iterates.seen[2]) is (averaging is LAST), "whose average begins with step 3"


def averaging_rank(_rank: int, _gather: Any, folder: Path) -> Tensor:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    task = TinyTask()
    the_loop(folder, task, how=pace(averaging=EMA)).train(None)
    return weights(task)


def test_two_ranks_have_the_same_average(tmp_path: Path) -> None:
    first, second = run_processes(2, averaging_rank, tmp_path / "run")
    assert torch.equal(first, second)
