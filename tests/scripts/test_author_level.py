"""train_clm.py with --privacy_unit COLUMN: plan, draws, accounting, report and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_clm
from dptune import accounting
from dptune.accounting import Spend
from dptune.accounting.rounding import rounded_up
from dptune.ledger import Ledger
from tests.scripts.test_resume import crash, refused, report_of, signal_in_step, weights_of
from tests.scripts.test_train_clm import REPORT_KEYS, flags
from utils.training.log import read_diagnostics
from utils.training.micro_batches import MicroBatches

pytestmark = pytest.mark.usefixtures("no_plots")

SIZES, STEPS = [1, 2, 2, 3, 5, 9, 12, 20], 6  # rows of each author
SETTINGS: dict[str, Any] = {
    "privacy_unit": "user",
    "examples_per_unit": 3,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": None,
    "max_train_steps": STEPS,
    "checkpointing_steps": 2,
    "noise_multiplier": 1.5,
    "delta": 1e-2,
}
KEPT = sum(min(size, 3) for size in SIZES) + 4
METHODS = {
    "user-level": {"q": 4 / 12, "counted": 12, "sampled": "authors", "group_size": 1},
    "example-level": {"q": 4 / KEPT, "counted": KEPT, "sampled": "examples", "group_size": 3},
}


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """58 rows: of eight named authors, and four rows without an author."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    users = [f"u{number}" for number, size in enumerate(SIZES) for _ in range(size)] + [None, "", " ", None]
    users = users[::2] + users[1::2]
    rows = [
        {"instruction": f"Repeat {n % 7}.", "answer": "word " * (1 + n % 4), "user": u} for n, u in enumerate(users)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def line(tiny_model_dir: Path, train_file: Path, tmp_path: Path) -> Any:
    def make(**changes: object) -> list[str]:
        return flags(tiny_model_dir, train_file, Path(str(changes.pop("out", tmp_path / "run"))), **SETTINGS | changes)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_run_reports_its_unit_and_what_the_ledger_holds(method: str, line: Any, tmp_path: Path, capsys: Any) -> None:
    wanted, out = METHODS[method], tmp_path / "run"
    train_clm.main(line(user_level_method=method))
    report, shown = report_of(out), capsys.readouterr().out
    assert set(report) == REPORT_KEYS
    assert report["privacy_unit"].startswith("one author (all rows with the same value in column user;")
    assert (
        "of their examples" in report["method"]
        if method == "user-level"
        else "3 examples per author" in report["method"]
    )
    assert (report["sampled"], report["group_size"]) == (wanted["sampled"], wanted["group_size"])
    assert (report["num_examples"], report["expected_batch_size"]) == (wanted["counted"], 4)
    spends = [Spend(1.5, pytest.approx(wanted["q"]), STEPS, wanted["group_size"])]
    assert Ledger(out / "ledger.jsonl").spends == spends
    spent = accounting.compose([Spend(1.5, wanted["q"], STEPS, wanted["group_size"])], delta=1e-2)
    assert report["epsilon"] == pytest.approx(spent)
    assert f"epsilon                {rounded_up(spent)} at delta 0.01" in shown
    card = (out / "publish" / "README.md").read_text()
    assert "one author (all rows with the same value in column user;" in card
    assert report["method"].split(":")[0] in card
    for told in (f"{wanted['sampled']:<22} {wanted['counted']:,}", "the largest author has 20 rows", "privacy unit  "):
        assert told in shown
    assert (f"{58 - KEPT} rows left out" in shown) == (method == "example-level")


def test_a_group_costs_more_than_its_examples_and_authors_cost_what_rows_would(line: Any, tmp_path: Path) -> None:
    for method in METHODS:
        train_clm.main(line(user_level_method=method, out=tmp_path / method))
    plain = accounting.epsilon(noise_multiplier=1.5, sampling_probability=4 / 12, steps=STEPS, delta=1e-2)
    assert report_of(tmp_path / "user-level")["epsilon"] == pytest.approx(plain)
    single = accounting.epsilon(noise_multiplier=1.5, sampling_probability=4 / KEPT, steps=STEPS, delta=1e-2)
    assert report_of(tmp_path / "example-level")["epsilon"] > 1.5 * single


@pytest.mark.parametrize("method", METHODS)
def test_the_noise_for_a_target_pays_for_the_unit(method: str, line: Any, tmp_path: Path) -> None:
    train_clm.main(line(user_level_method=method, noise_multiplier=None, target_epsilon=3))
    report = report_of(tmp_path / "run")
    assert 2.9 < report["epsilon"] <= 3


def test_steps_draw_authors_with_at_most_k_rows_each(
    line: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draws: list[Any] = []
    run = MicroBatches.run
    monkeypatch.setattr(MicroBatches, "run", lambda self, draw, *rest: draws.append(draw) or run(self, draw, *rest))
    train_clm.main(line(max_train_steps=20, checkpointing_steps=0))
    rows = [len(own) for draw in draws for own in draw.rows]
    assert max(rows) == 3
    assert 1 in rows
    logged = read_diagnostics(tmp_path / "run" / "diagnostics.jsonl")[1:]
    assert [row["batch_drawn"] for row in logged] == [len(draw) for draw in draws]
    assert 2 < sum(len(draw) for draw in draws) / 20 < 6


def test_with_repeatable_randomness_a_stopped_run_ends_as_one_that_was_not(
    line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    how = {"insecure_test_seed": 4}
    train_clm.main(line(**how, out=tmp_path / "calm"))
    with monkeypatch.context() as patch:
        signal_in_step(patch, 4, signal.SIGTERM)
        train_clm.main(line(**how))
    train_clm.main(line(**how, resume_from_checkpoint="latest"))
    ours, theirs = weights_of(tmp_path / "run"), weights_of(tmp_path / "calm")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


CHANGED = {
    "k": ({"examples_per_unit": 4}, "examples_per_unit was 3 in the checkpoint and is 4 now"),
    "column": ({"privacy_unit": "answer"}, "privacy_unit was 'user' in the checkpoint and is 'answer' now"),
    "method": ({"user_level_method": "example-level"}, "user_level_method was 'user-level' in the checkpoint"),
    "gradient": ({"unit_gradient": "sum"}, "unit_gradient was 'mean' in the checkpoint and is 'sum' now"),
    "rows": (
        {"privacy_unit": None, "examples_per_unit": None, "ignore_users": True},
        "privacy_unit was 'user' in the checkpoint and is None",
    ),
}


def test_a_run_resumes_with_the_same_unit_only(line: Any, tmp_path: Path, capsys: Any) -> None:
    crash(line(), 5)
    for changes, told in CHANGED.values():
        assert told in refused(line(resume_from_checkpoint="latest", gradient_accumulation_steps=1, **changes), capsys)
    train_clm.main(line(resume_from_checkpoint="latest"))
    report = report_of(tmp_path / "run")
    assert (report["steps"], report["repeated_steps"]) == (STEPS + 1, 1)


def test_bounded_rows_are_the_same_when_a_run_resumes_and_the_budget_counts_groups(line: Any, tmp_path: Path) -> None:
    how = {"user_level_method": "example-level", "noise_multiplier": None, "target_epsilon": 3}
    crash(line(**how), 5)
    train_clm.main(line(**how, resume_from_checkpoint="latest"))
    report = report_of(tmp_path / "run")
    assert (report["steps"], report["repeated_steps"]) == (STEPS, 1)
    assert report["epsilon"] <= 3


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "no such column": ({"privacy_unit": "author"}, "--privacy_unit='author': no such column in"),
    "no k": ({"examples_per_unit": None}, "--examples_per_unit=None: give the maximum examples per author"),
    "k of 0": ({"examples_per_unit": 0}, "--examples_per_unit=0: give a whole number of at least 1"),
    "k of rows": ({"privacy_unit": None}, "--examples_per_unit=3: is for authors"),
    "no name": ({"privacy_unit": " "}, "--privacy_unit=' ': give `example`, or the column"),
    "method": ({"user_level_method": "group"}, "--user-level-method: invalid choice: 'group'"),
    "gradient": ({"unit_gradient": "max"}, "--unit-gradient: invalid choice: 'max'"),
    "batch": ({"gradient_accumulation_steps": 4}, "more than the 12 authors there are"),
    "delta": ({"delta": 0.1}, "--delta=0.1: must be below 1/num_examples = 0.0833"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, line: Any, capsys: Any, tmp_path: Path) -> None:
    changes, told = MISTAKES[name]
    assert told in refused(line(**changes), capsys)
    assert not (tmp_path / "run").exists()


def test_without_privacy_authors_are_sampled_too(line: Any, tmp_path: Path) -> None:
    train_clm.main(line(clip_norm=-1, noise_multiplier=-1, delta=None, max_train_steps=2))
    report = report_of(tmp_path / "run")
    assert (report["guarantee"], report["sampled"], report["num_examples"]) == ("none", "authors", 12)
