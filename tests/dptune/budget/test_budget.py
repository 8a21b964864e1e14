"""Composed stages: compared with dp-accounting, after crashes, and where no epsilon can be stated."""

from __future__ import annotations

from pathlib import Path

import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from dptune._validate import InvalidArgument
from dptune.accounting import Cut, Spend, compose, epsilon
from dptune.budget import Budget
from dptune.budget.__main__ import main
from dptune.keystream import FIXED
from dptune.ledger import Ledger, has_begun
from dptune.sampling import FIXED_KEY, NOT_SHOWN

DELTA, UNIT = 1e-7, "one training example"
SIGMA, Q, STEPS = 1.2, 2048 / 75329, 184


def trained(folder: Path, steps: int = STEPS) -> Path:
    path = folder / "ledger.jsonl"
    entry = '{{"step": {}, "noise_multiplier": {}, "sampling_probability": {}, "clip_norm": 1.0}}\n'
    path.write_text("".join(entry.format(step + 1, SIGMA, Q) for step in range(steps)))
    return path


def pipeline(folder: Path) -> Budget:
    budget = Budget(folder / "budget.jsonl")
    budget.enter_training("generator", trained(folder), unit=UNIT)
    budget.enter_gaussian("histogram", 10.0, unit=UNIT)
    return budget


def test_training_and_histogram_cost_what_dp_accounting_says_by_hand(tmp_path: Path) -> None:
    step = PoissonSampledDpEvent(Q, GaussianDpEvent(SIGMA))
    by_hand = []
    for interval in (1e-3, 1e-4):  # a wider grid gives a larger bound
        accountant = PLDAccountant(value_discretization_interval=interval)
        accountant.compose(ComposedDpEvent([SelfComposedDpEvent(step, STEPS), GaussianDpEvent(10.0)]))
        by_hand.append(accountant.get_epsilon(DELTA))
    assert round(by_hand[0], 3) == 2.304
    assert by_hand[1] < (pipeline(tmp_path).epsilon(DELTA) or 0) < by_hand[1] * (1 + 1e-7)  # the margin for rounding


def test_a_training_with_cut_draws_counts_the_cut(tmp_path: Path) -> None:
    budget, ledger = pipeline(tmp_path), Ledger(tmp_path / "ledger.jsonl")
    ledger.record(
        noise_multiplier=SIGMA, sampling_probability=Q, clip_norm=1.0, sampler="Poisson, cut", cut=Cut(2100, 75329)
    )
    spends = [Spend(SIGMA, Q, STEPS), Spend(SIGMA, Q, 1, 1, Cut(2100, 75329)), Spend(10.0, 1.0, 1)]
    assert budget.reasons == []
    assert budget.epsilon(DELTA) == compose(spends, delta=DELTA)


def test_together_they_cost_more_than_either_and_less_than_the_sum(tmp_path: Path) -> None:
    whole = pipeline(tmp_path).epsilon(DELTA)
    training = epsilon(noise_multiplier=SIGMA, sampling_probability=Q, steps=STEPS, delta=DELTA)
    histogram = epsilon(noise_multiplier=10.0, sampling_probability=1.0, steps=1, delta=DELTA)
    assert whole is not None
    assert max(training, histogram) < whole < training + histogram


def test_the_file_read_again_says_the_same(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    assert Budget(budget.path).stages == budget.stages


def test_every_release_of_a_histogram_counts_and_a_resumed_training_once(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    once = budget.epsilon(DELTA)
    budget.enter_training("generator again", tmp_path / "ledger.jsonl", unit=UNIT)
    assert budget.epsilon(DELTA) == once
    budget.enter_gaussian("histogram again", 10.0, unit=UNIT)
    twice = budget.epsilon(DELTA)
    assert once is not None
    assert twice is not None
    assert twice > once


def test_one_release_is_entered_once_and_two_releases_twice(tmp_path: Path) -> None:
    for release in ("a", "b", "a", None, None):
        Budget(tmp_path / "budget.jsonl").enter_gaussian("histogram", 10.0, unit=UNIT, release=release)
    assert [stage.release for stage in Budget(tmp_path / "budget.jsonl").stages] == ["a", "b", None, None]


def test_steps_that_a_training_takes_later_count(tmp_path: Path) -> None:
    ledger = trained(tmp_path, steps=10)
    budget = Budget(tmp_path / "budget.jsonl")
    budget.enter_training("generator", ledger, unit=UNIT)
    early = budget.epsilon(DELTA)
    Ledger(ledger).record(noise_multiplier=SIGMA, sampling_probability=Q, clip_norm=1.0)
    late = budget.epsilon(DELTA)
    assert early is not None
    assert late is not None
    assert late > early


def test_a_stage_is_on_disk_when_it_is_entered_and_a_torn_line_is_forgotten(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    whole = budget.path.read_bytes()
    budget.path.write_bytes(whole + b'{"stage": "histogram 2", "uni')
    again = Budget(budget.path)
    assert again.stages == budget.stages
    again.enter_gaussian("histogram 2", 5.0, unit=UNIT)
    assert [stage.stage for stage in Budget(budget.path).stages] == ["generator", "histogram", "histogram 2"]


@pytest.mark.parametrize("tail", ["", '\n{"stage": "histogram 2", "uni'])
def test_reading_changes_nothing_and_a_whole_last_line_needs_no_line_end(tail: str, tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    content = budget.path.read_bytes().removesuffix(b"\n") + tail.encode()
    budget.path.write_bytes(content)
    main([str(budget.path), "--delta", str(DELTA)])
    assert budget.path.read_bytes() == content
    again = Budget(budget.path)
    assert again.stages == budget.stages
    again.enter_gaussian("histogram 2", 5.0, unit=UNIT)
    assert Budget(budget.path).stages == again.stages
    assert len(again.stages) == 3


def test_a_budget_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Budget(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", '{"stage": "x", "unit": "u", "kind": "gaussian"}', '{"stage": "x", "unit": "u", "kind": "y"}',
     '{"stage": "x", "unit": "u", "kind": "gaussian", "noise_multiplier": -1}', '{"kind": "training"}'],
)  # fmt: skip
def test_a_line_that_is_no_entry_is_refused_and_not_left_out(line: str, tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    budget.path.write_text(line + "\n" + budget.path.read_text())
    with pytest.raises(InvalidArgument, match=r"budget\.jsonl:1"):
        Budget(budget.path)


def test_a_training_without_its_ledger_has_no_epsilon(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(InvalidArgument, match="generator"):
        budget.epsilon(DELTA)


def test_a_training_in_the_place_of_one_that_was_moved_away_is_refused(tmp_path: Path) -> None:
    """Otherwise its ledger would hide what the first training spent."""
    budget = pipeline(tmp_path)
    (tmp_path / "ledger.jsonl").rename(tmp_path / "old.jsonl")
    with pytest.raises(InvalidArgument, match=r"generator 2 \(ledger\.jsonl\).*put it back"):
        budget.enter_training("generator 2", tmp_path / "ledger.jsonl", unit=UNIT)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_training_that_never_began_has_spent_nothing(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.jsonl")
    budget.enter_training("mistyped", tmp_path / "outputs" / "one" / "ledger.jsonl", unit=UNIT)
    budget.enter_training("mistyped", tmp_path / "outputs" / "one" / "ledger.jsonl", unit=UNIT)
    assert not has_begun(tmp_path / "outputs" / "one" / "ledger.jsonl")
    assert budget.epsilon(DELTA) == 0
    budget.enter_gaussian("histogram", 10.0, unit=UNIT)
    alone = epsilon(noise_multiplier=10.0, sampling_probability=1.0, steps=1, delta=DELTA)
    assert budget.epsilon(DELTA) == pytest.approx(alone, rel=1e-9)


def test_what_another_program_enters_meanwhile_counts(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    Budget(budget.path).enter_without_privacy("second generator", "trained without clipping and noise")
    assert budget.epsilon(DELTA) is None
    assert "NO GUARANTEE" in budget.describe(DELTA)[-1]


def test_two_units_that_were_entered_at_one_time_do_not_add_up_either(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    late = budget.path.read_text().splitlines()[-1].replace(UNIT, "one author")
    budget.path.write_text(budget.path.read_text() + late + "\n")
    for ask in (budget.epsilon, budget.describe):
        with pytest.raises(InvalidArgument, match="two units"):
            ask(DELTA)


def test_a_stage_with_hardly_any_noise_leaves_no_guarantee(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    budget.enter_gaussian("histogram", 1e-200, unit=UNIT)
    assert budget.describe(DELTA)[-1].endswith("NO GUARANTEE (some noise is so small that epsilon is infinite)")


@pytest.mark.parametrize(
    "how", [{"sampler": NOT_SHOWN}, {"sampler": FIXED_KEY}, {"sampler": "shuffled"}, {"noise_key": FIXED}]
)
def test_a_ledger_whose_lines_have_no_guarantee_voids_the_whole(how: dict[str, str], tmp_path: Path) -> None:
    """20 steps on one row without a sampler had an epsilon of 0.455 here, and "none" in their own report."""
    budget = pipeline(tmp_path)
    assert budget.reasons == []
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(noise_multiplier=SIGMA, sampling_probability=Q, clip_norm=1.0, **how)
    (reason,) = ledger.reasons
    assert budget.reasons == [f"generator: {reason}"]
    assert budget.epsilon(DELTA) is None
    generator, _, together = budget.describe(DELTA)
    assert f" NO GUARANTEE: {reason} (" in generator
    assert together.endswith(f"NO GUARANTEE (generator: {reason})")


def test_a_stage_without_privacy_voids_the_whole(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    budget.enter_without_privacy("second generator", "trained without clipping and noise")
    assert budget.epsilon(DELTA) is None
    said = "\n".join(Budget(budget.path).describe(DELTA))
    assert "NO GUARANTEE (second generator: trained without clipping and noise)" in said


def test_two_units_do_not_add_up(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    with pytest.raises(InvalidArgument, match="two units"):
        budget.enter_gaussian("histogram of authors", 10.0, unit="one author")
    assert len(Budget(budget.path).stages) == 2


def test_a_ledger_that_was_entered_for_another_unit_is_refused(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "budget.jsonl")
    budget.enter_training("generator", trained(tmp_path), unit="one author")
    with pytest.raises(InvalidArgument, match=r"unit='one training example': .*protect one author; .*new file"):
        Budget(budget.path).enter_training("generator", tmp_path / "ledger.jsonl", unit=UNIT)
    assert [stage.unit for stage in Budget(budget.path).stages] == ["one author"]


def test_the_folder_may_move_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    before = pipeline(tmp_path / "here").epsilon(DELTA)
    (tmp_path / "here").rename(tmp_path / "there")
    assert Budget(tmp_path / "there" / "budget.jsonl").epsilon(DELTA) == before


def test_the_command_line_prints_each_stage_and_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(pipeline(tmp_path).path)
    main([path, "--delta", str(DELTA)])
    generator, histogram, together, unit = capsys.readouterr().out.splitlines()
    assert "generator" in generator
    assert "2.257" in generator
    assert "histogram" in histogram
    assert "2.303" in together
    assert unit == f"for {UNIT}"


def test_a_printed_bound_is_not_rounded_down(tmp_path: Path) -> None:
    budget = pipeline(tmp_path)
    exact = budget.epsilon(DELTA)
    assert exact is not None
    assert float(budget.describe(DELTA)[-2].split("epsilon ")[1].split()[0]) >= exact


@pytest.mark.parametrize("arguments", [["nowhere.jsonl", "--delta", "1e-5"], ["{path}", "--delta", "2"]])
def test_mistakes_are_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(pipeline(tmp_path).path)
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(path=path) for argument in arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
