"""A budget file with a limit: a training reserves its steps before it starts, and is refused beyond the limit."""

from __future__ import annotations

import json
import multiprocessing
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from dptune.accounting import Spend, compose
from dptune.budget import Budget
from dptune.budget.stages import Stage, append_stage
from dptune.ledger import Ledger, begin_ledger
from dptune.run.lock import FolderLock
from dptune.sampling import CYCLIC_SAMPLER

UNIT, DELTA = "one training example", 1e-6
RUN = Spend(1.0, 0.01, 300)  # epsilon 1.5 at this delta
ONE = compose([RUN], delta=DELTA)
TWO = compose([RUN._replace(steps=600)], delta=DELTA)


@pytest.fixture
def register(tmp_path: Path) -> Budget:
    """Room for two such runs, but not for three."""
    budget = Budget(tmp_path / "people.jsonl")
    budget.set_limit(TWO * 1.01, DELTA)
    return budget


def reserve(register: Budget, name: str, *spends: Spend, resumes: bool = False) -> Path:
    ledger = register.path.parent / name / "ledger.jsonl"
    register.reserve(ledger, spends or (RUN,), unit=UNIT, resumes=resumes)
    begin_ledger(ledger)
    return ledger


def take(ledger: Path, steps: int) -> None:
    book = Ledger(ledger)
    for _ in range(steps):
        book.record(noise_multiplier=RUN.noise_multiplier, sampling_probability=0.01, clip_norm=1.0)


def test_runs_add_up_and_the_one_that_would_overspend_is_refused(register: Budget) -> None:
    reserve(register, "one")
    assert register.epsilon(DELTA) == ONE
    reserve(register, "two")
    assert register.epsilon(DELTA) == TWO
    before = register.path.read_bytes()
    with pytest.raises(InvalidArgument, match=r"register=.*allows epsilon .*with three it would be .*more noise"):
        reserve(register, "three")
    assert register.path.read_bytes() == before
    assert not (register.path.parent / "three").exists()


def test_a_run_counts_with_all_its_steps_before_it_takes_any(register: Budget) -> None:
    ledger = reserve(register, "one")
    assert Ledger(ledger).steps == 0
    assert register.epsilon(DELTA) == ONE
    take(ledger, 3)
    assert register.epsilon(DELTA) == ONE


def test_a_resumed_run_replaces_its_entry_and_counts_repeated_steps(register: Budget) -> None:
    ledger = reserve(register, "one")
    take(ledger, 5)
    reserve(register, "one", RUN._replace(steps=305), resumes=True)
    assert register.epsilon(DELTA) == compose([RUN._replace(steps=305)], delta=DELTA)
    reserve(register, "two")
    with pytest.raises(InvalidArgument, match="allows epsilon"):
        reserve(register, "one", RUN._replace(steps=700), resumes=True)


def test_steps_taken_and_steps_to_come_of_a_resumed_run_add_up(register: Budget) -> None:
    """A run reserves them as two entries with the same settings."""
    ledger = reserve(register, "one")
    take(ledger, 5)
    reserve(register, "one", RUN._replace(steps=5), RUN._replace(steps=300), resumes=True)
    assert register.epsilon(DELTA) == compose([RUN._replace(steps=305)], delta=DELTA)


def test_a_launch_that_took_no_step_is_started_again_without_counting_twice(register: Budget) -> None:
    reserve(register, "one")
    reserve(register, "one")
    assert register.epsilon(DELTA) == ONE


def test_a_deleted_runs_folder_hides_nothing(register: Budget) -> None:
    ledger = reserve(register, "one")
    take(ledger, 1)
    ledger.unlink()
    ledger.parent.rmdir()
    assert register.epsilon(DELTA) == ONE
    reserve(register, "one")
    assert register.epsilon(DELTA) == TWO


def test_more_steps_in_the_ledger_than_were_reserved_count(register: Budget) -> None:
    ledger = reserve(register, "one", RUN._replace(steps=2))
    take(ledger, 5)
    assert register.epsilon(DELTA) == compose([RUN._replace(steps=5)], delta=DELTA)


def test_a_closed_run_gives_back_what_it_did_not_take_and_cannot_resume(register: Budget) -> None:
    ledger = reserve(register, "one")
    reserve(register, "two")
    take(ledger, 10)
    register.close("one")
    assert register.epsilon(DELTA) == compose([RUN._replace(steps=310)], delta=DELTA)
    with pytest.raises(InvalidArgument, match="one is closed there, so it cannot resume"):
        reserve(register, "one", resumes=True)
    ledger.unlink()
    assert register.epsilon(DELTA) == compose([RUN._replace(steps=310)], delta=DELTA)
    assert "closed after 10 steps" in register.describe(DELTA)[1]


def test_only_what_is_there_and_has_a_guarantee_can_be_closed(register: Budget) -> None:
    with pytest.raises(InvalidArgument, match="0 trainings of this name"):
        register.close("one")
    ledger = reserve(register, "one")
    Ledger(ledger).record(noise_multiplier=1.0, sampling_probability=0.01, clip_norm=1.0, noise_key="fixed")
    with pytest.raises(InvalidArgument, match="states no guarantee"):
        register.close("one")
    ledger.unlink()
    with pytest.raises(InvalidArgument, match="is missing, so all reserved steps count"):
        register.close("one")


def test_other_releases_count_and_are_refused_beyond_the_limit(register: Budget) -> None:
    register.enter_stated("survey 2025", ONE, 0.0, unit=UNIT)
    register.enter_gaussian("histogram", 50.0, unit=UNIT)
    together = ONE + compose([Spend(50.0, 1.0, 1)], delta=DELTA)
    assert register.epsilon(DELTA) == pytest.approx(together, rel=1e-12)
    before = register.path.read_bytes()
    for enter in (
        lambda: register.enter_gaussian("another histogram", 1.0, unit=UNIT),
        lambda: register.enter_stated("another survey", ONE, 0.0, unit=UNIT),
        lambda: register.enter_without_privacy("leak", "no noise"),
        lambda: register.enter_training("old way", register.path.parent / "ledger.jsonl", unit=UNIT),
    ):
        with pytest.raises(InvalidArgument):
            enter()
    assert register.path.read_bytes() == before


def test_a_stated_delta_is_taken_off_the_whole(register: Budget) -> None:
    reserve(register, "one")
    register.enter_stated("survey", 0.1, DELTA / 2, unit=UNIT)
    assert register.epsilon(DELTA) == compose([RUN], delta=DELTA / 2) + 0.1
    with pytest.raises(InvalidArgument, match="allows epsilon"):
        register.enter_stated("another", 0.1, DELTA, unit=UNIT)


def test_two_units_do_not_add_up(register: Budget) -> None:
    reserve(register, "one")
    with pytest.raises(InvalidArgument, match="epsilons of two units cannot be added"):
        register.reserve(register.path.parent / "two" / "ledger.jsonl", [RUN], unit="one author", resumes=False)


def test_a_plan_is_checked_without_an_entry(register: Budget) -> None:
    before = register.path.read_bytes()
    ledger = register.path.parent / "one" / "ledger.jsonl"
    assert register.require_room(ledger, [RUN], unit=UNIT, resumes=False) == ONE
    with pytest.raises(InvalidArgument, match="allows epsilon"):
        register.require_room(ledger, [RUN._replace(steps=900)], unit=UNIT, resumes=False)
    assert register.path.read_bytes() == before


def test_a_file_without_a_limit_or_that_is_missing_is_no_register(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"there is no such file; python -m dptune\.budget FILE --limit"):
        Budget.register(tmp_path / "people.jsonl")
    Budget(tmp_path / "people.jsonl").enter_gaussian("histogram", 10.0, unit=UNIT)
    with pytest.raises(InvalidArgument, match="has no limit"):
        Budget.register(tmp_path / "people.jsonl")


def test_the_latest_limit_holds_and_earlier_ones_stay_in_the_file(register: Budget) -> None:
    register.set_limit(ONE / 2, DELTA)
    with pytest.raises(InvalidArgument, match="allows epsilon"):
        reserve(register, "one")
    register.set_limit(3.0, 1e-5)
    assert register.limit == (3.0, 1e-5)
    assert [json.loads(line)["kind"] for line in register.path.read_text().splitlines()] == ["limit"] * 3


def _try_to_reserve(path: Path, name: str) -> bool:
    try:
        Budget(path).reserve(path.parent / name / "ledger.jsonl", [RUN], unit=UNIT, resumes=False)
    except InvalidArgument:
        return False
    return True


def test_of_many_runs_that_start_at_once_only_those_with_room_are_entered(
    register: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(path: Path, stage: Stage) -> None:
        time.sleep(0.3)  # so that the others look at the limit before this line is there, unless they wait
        append_stage(path, stage)

    monkeypatch.setattr("dptune.budget.append_stage", slowly)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        entered = pool.starmap(_try_to_reserve, [(register.path, f"run-{number}") for number in range(4)], 1)
    assert sum(entered) == len(register.stages) == 2
    assert register.epsilon(DELTA) == TWO


def test_a_run_with_noise_bands_counts_turns(register: Budget) -> None:
    ledger = reserve(register, "one", Spend(1.0, 0.02, 3))
    book = Ledger(ledger)
    block = book.begin_block()
    for _ in range(4):
        book.record(
            noise_multiplier=1.0,
            sampling_probability=0.01,
            clip_norm=1.0,
            sampler=CYCLIC_SAMPLER,
            noise_bands=2,
            block=block,
        )
    assert "2 of 3 turns taken" in register.describe(DELTA)[0]
    assert register.epsilon(DELTA) == compose([Spend(1.0, 0.02, 3)], delta=DELTA)


def test_a_run_that_goes_on_after_it_was_closed_still_counts(register: Budget) -> None:
    """A loop of one's own may hold no lock, so nothing shows that it is running."""
    ledger = reserve(register, "one")
    take(ledger, 10)
    register.close("one")
    take(ledger, 290)
    assert register.epsilon(DELTA) == ONE


def test_a_running_training_cannot_be_closed(register: Budget) -> None:
    ledger = reserve(register, "one")
    take(ledger, 10)
    with FolderLock() as lock:
        lock.take(ledger.parent)
        with pytest.raises(InvalidArgument, match="another process is at work in it"):
            register.close("one")
    assert register.epsilon(DELTA) == ONE
    register.close("one")
    assert register.epsilon(DELTA) < ONE


def test_a_run_that_what_it_learned_ended_early_gives_nothing_back(register: Budget) -> None:
    ledger = reserve(register, "one")
    take(ledger, 10)
    Ledger(ledger).count_unused(290)
    with pytest.raises(InvalidArgument, match="so its planned steps count and it has none to give back"):
        register.close("one")
    assert register.epsilon(DELTA) == ONE


def test_a_closed_run_is_not_charged_for_another_one_in_its_folder(register: Budget) -> None:
    ledger = reserve(register, "one")
    take(ledger, 10)
    register.close("one")
    ledger.unlink()
    take(reserve(register, "one"), 300)
    assert register.epsilon(DELTA) == compose([RUN._replace(steps=310)], delta=DELTA)


def test_a_limit_waits_for_a_training_that_reserved_no_steps(tmp_path: Path) -> None:
    budget, ledger = Budget(tmp_path / "budget.jsonl"), tmp_path / "one" / "ledger.jsonl"
    budget.enter_training("one", ledger, unit=UNIT)
    take(ledger, 10)
    before = budget.path.read_bytes()
    with pytest.raises(InvalidArgument, match=r"^--limit=2\.5: cannot hold while one has not finished: it may take"):
        budget.set_limit(2.5, DELTA)
    assert budget.path.read_bytes() == before
    (ledger.parent / "publish").mkdir()
    budget.set_limit(2.5, DELTA)


@pytest.mark.parametrize("ran_on", [0, 40])
def test_steps_that_an_early_end_left_out_count_until_they_run(tmp_path: Path, ran_on: int) -> None:
    budget, ledger = Budget(tmp_path / "budget.jsonl"), tmp_path / "one" / "ledger.jsonl"
    budget.enter_training("one", ledger, unit=UNIT)
    take(ledger, 10)
    Ledger(ledger).count_unused(290)
    take(ledger, ran_on)
    assert budget.epsilon(DELTA) == ONE
    ledger.with_name("counted_steps.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"counted_steps\.json.* does not say how many steps count; restore"):
        budget.epsilon(DELTA)


def test_a_run_may_be_closed_by_its_folder(register: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    take(reserve(register, "runs/one"), 10)
    monkeypatch.chdir(register.path.parent / "runs")
    for stage in ("other", "runs/one"):  # of another folder
        with pytest.raises(InvalidArgument, match="0 trainings of this name") if stage == "other" else nullcontext():
            register.close(stage)
    take(reserve(register, "two"), 10)
    register.close("../two")
    take(reserve(register, "three"), 10)
    register.close(str(register.path.parent / "three"))
    assert register.epsilon(DELTA) == compose([RUN._replace(steps=30)], delta=DELTA)
