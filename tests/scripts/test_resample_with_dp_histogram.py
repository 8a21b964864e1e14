"""The resampling script as a user runs it: budget before release, nothing released twice, one line for a mistake."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dptune.accounting import epsilon
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.budget import Budget
from dptune.grid import grid_of
from dptune.keystream import Keystream
from scripts import resample_with_dp_histogram as script
from tests.utils.synthetic.test_resampling import ANIMALS, MONEY
from utils.files.jsonl import write_jsonl
from utils.files.tables import read_rows
from utils.synthetic.resampling import Buckets

SECRET = "Jane Roe has measles"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    synthetic = [{"id": f"syn-{number}", "instruction": text} for number, text in enumerate(ANIMALS + MONEY)]
    write_jsonl(tmp_path / "synthetic.jsonl", synthetic)
    real = [{"instruction": f"the cow ran {number}", "u": f"u{number % 4}"} for number in range(40)]
    write_jsonl(tmp_path / "real.jsonl", real)
    return tmp_path


def run(folder: Path, *more: str, out: str = "out", keystream: Keystream | None = None) -> Path:
    files = ["--real_file", str(folder / "real.jsonl"), "--synthetic_file", str(folder / "synthetic.jsonl")]
    settings = ["--output_dir", str(folder / out), "--num_buckets", "2", "--histogram_sigma", "2", "--delta", "1e-5"]
    script.main([*files, *settings, *more], keystream=keystream)
    return folder / out


def test_what_is_kept_is_of_the_kinds_that_private_records_are(folder: Path) -> None:
    out = run(folder, "--num_samples", "9")
    kept = read_rows(out / "resampled.jsonl", "--file")
    assert sum(row["instruction"] in ANIMALS for row in kept) >= 7  # 40 votes against noise of 2
    assert all(str(row["id"]).startswith("syn-") for row in kept)


def test_the_release_is_in_the_budget_with_its_noise_and_composes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = Budget(folder / "budget.jsonl")
    budget.enter_gaussian("generator", 1.5, unit=script.PrivacyUnit().name)
    run(folder, "--budget_file", str(folder / "budget.jsonl"))
    stages = Budget(folder / "budget.jsonl").stages
    assert [(stage.stage, stage.noise_multiplier) for stage in stages] == [("generator", 1.5), (script.STAGE, 2.0)]
    together = (1.5**-2 + 2.0**-2) ** -0.5  # two Gaussian releases are one with this noise
    expected = epsilon(noise_multiplier=together, sampling_probability=1.0, steps=1, delta=1e-5)
    assert Budget(folder / "budget.jsonl").epsilon(1e-5) == pytest.approx(expected, rel=1e-3)
    assert f"epsilon {expected:.2f}"[:-1] in capsys.readouterr().out


def test_without_a_delta_the_default_one_is_taken_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--real_file", str(folder / "real.jsonl"), "--synthetic_file", str(folder / "synthetic.jsonl")]
    script.main([*files, "--output_dir", str(folder / "out"), "--num_buckets", "2", "--histogram_sigma", "2"])
    printed, votes = capsys.readouterr().out, len(read_rows(folder / "real.jsonl", "--file"))
    assert delta_in_words(votes, "votes") in printed
    assert f"at delta {default_delta(votes):g}" in printed


def test_the_same_line_again_releases_nothing_new(folder: Path) -> None:
    out = run(folder)
    histogram, kept = (out / "histogram.json").read_bytes(), (out / "resampled.jsonl").read_bytes()
    run(folder)
    assert (out / "histogram.json").read_bytes() == histogram
    assert (out / "resampled.jsonl").read_bytes() == kept
    assert len(Budget(out / "budget.jsonl").stages) == 1


def test_a_second_program_in_the_folder_is_refused_before_it_spends_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins when the first one enters its release into the budget, so before there are votes to find."""
    enter = Budget.enter_gaussian

    def entering(budget: Budget, *args: Any, **how: Any) -> None:
        monkeypatch.setattr(Budget, "enter_gaussian", enter)
        with pytest.raises(SystemExit):
            run(folder)
        assert "another process is at work in it" in capsys.readouterr().err
        enter(budget, *args, **how)

    monkeypatch.setattr(Budget, "enter_gaussian", entering)
    assert len(Budget(run(folder) / "budget.jsonl").stages) == 1


def test_votes_that_are_used_again_are_in_whichever_budget_is_given(folder: Path) -> None:
    run(folder)
    for _ in range(2):
        run(folder, "--budget_file", str(folder / "late.jsonl"))
    first, late = Budget(folder / "out" / "budget.jsonl"), Budget(folder / "late.jsonl")
    assert late.stages == first.stages  # the same release, once in each
    assert late.epsilon(1e-5) == first.epsilon(1e-5)


def test_a_budget_that_begins_with_the_release_says_so_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder)
    assert f"NOTE: {folder / 'out' / 'budget.jsonl'} is new" in capsys.readouterr().out
    run(folder)
    assert "begins with" not in capsys.readouterr().out


def test_a_budget_without_an_epsilon_is_found_before_more_is_spent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = Budget(folder / "budget.jsonl")
    budget.enter_training("generator", folder / "ledger.jsonl", unit=script.PrivacyUnit().name)
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(SystemExit):
        run(folder, "--budget_file", str(budget.path))
    assert "generator (ledger.jsonl)" in capsys.readouterr().err
    assert len(budget.stages) == 1
    assert not (folder / "out" / "histogram.json").exists()


def test_votes_of_other_authors_are_not_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--privacy_unit", "u", keystream=Keystream.for_tests(1))
    rows = read_rows(folder / "real.jsonl", "--file")
    write_jsonl(folder / "real.jsonl", [{**row, "u": "one"} for row in rows])
    with pytest.raises(SystemExit):
        run(folder, "--privacy_unit", "u", "--delta", "0.01")
    assert "votes were made with other units" in capsys.readouterr().err


def test_votes_under_a_fixed_key_void_another_budget_too(folder: Path) -> None:
    run(folder, keystream=Keystream.for_tests(1))
    run(folder, "--budget_file", str(folder / "late.jsonl"))
    assert Budget(folder / "late.jsonl").epsilon(1e-5) is None


def test_a_crash_before_the_votes_are_saved_counts_and_the_next_release_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(script, "save_votes", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(folder)
    assert len(Budget(folder / "out" / "budget.jsonl").stages) == 1
    assert len(Budget(run(folder) / "budget.jsonl").stages) == 2


def test_the_budget_is_entered_before_the_noise_is_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object) -> np.ndarray:
        assert len(Budget(folder / "out" / "budget.jsonl").stages) == 1
        raise RuntimeError("seen")

    monkeypatch.setattr(script, "release", refusing)
    with pytest.raises(RuntimeError, match="seen"):
        run(folder)


def test_released_votes_are_noisy_and_differ_from_run_to_run(folder: Path) -> None:
    votes = [json.loads((run(folder, out=out) / "histogram.json").read_text())["noisy_votes"] for out in ("a", "b")]
    assert not np.isclose(*votes).all()  # one of them may meet by chance, on the grid
    assert not np.any(np.array(votes) % grid_of(2.0))  # not the float's last bits, which would tell the counts


def test_noise_under_a_fixed_key_is_no_privacy(folder: Path) -> None:
    out = run(folder, keystream=Keystream.for_tests(1))
    assert Budget(out / "budget.jsonl").epsilon(1e-5) is None


def test_an_author_has_one_vote_in_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(script, "release", lambda votes, *_: seen.append(votes) or votes)
    out = run(folder, "--privacy_unit", "u", out="users")
    assert seen[0].sum() == pytest.approx(4)  # authors, of 40 records
    assert "column u;" in Budget(out / "budget.jsonl").stages[0].unit


def test_users_that_nobody_thought_of_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder / "real.jsonl", "--file")
    write_jsonl(folder / "real.jsonl", [*rows, {"instruction": "the cow ran", "Hashed-IP": "x"}])
    with pytest.raises(SystemExit):
        run(folder)
    assert "names users in Hashed-IP; give --privacy_unit Hashed-IP" in capsys.readouterr().err
    assert not (folder / "out").exists()
    run(folder, "--ignore_users")


def test_other_settings_in_the_same_folder_are_refused(folder: Path) -> None:
    run(folder)
    with pytest.raises(SystemExit):
        run(folder, "--seed", "3")
    assert len(Budget(folder / "out" / "budget.jsonl").stages) == 1


def test_votes_for_other_clusters_are_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder)
    clustered = script.cluster

    def renumbered(*how: Any) -> Buckets:
        found = clustered(*how)
        return Buckets(found.centers[::-1], len(found) - 1 - found.of_synthetic)

    monkeypatch.setattr(script, "cluster", renumbered)
    with pytest.raises(SystemExit):
        run(folder)
    assert "its votes were made with other clusters" in capsys.readouterr().err


def test_few_votes_a_bucket_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--num_buckets", "10", "--histogram_sigma", "5")
    assert "40 records give 4.0 votes per cluster, less than the noise of 5" in capsys.readouterr().out
    # 40 records are 20 a bucket, but not votes. A fixed key: one time in eight neither bucket has more than noise.
    authors = ("--histogram_sigma", "5", "--privacy_unit", "u")
    run(folder, *authors, out="users", keystream=Keystream.for_tests(1))
    assert "4 authors give 2.0 votes per cluster, less than the noise of 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--histogram_sigma", "0"], "--histogram_sigma=0.0"),
        (["--num_buckets", "0"], "--num_buckets=0"),
        (["--num_buckets", "50"], "--num_buckets=50: there are only 18 different"),
        (["--delta", "0.2"], "--delta=0.2: must be below 1/num_examples"),
        (["--text_column", "text"], "--text_column='text': no such column"),
        (["--privacy_unit", "author"], "--privacy_unit='author': no such column"),
        (["--real_file", "nowhere.jsonl"], "no such file"),
    ],
)
def test_mistakes_are_one_line_and_cost_nothing(
    flags: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(folder, *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (folder / "out" / "budget.jsonl").exists()


def dates_in_parquet(folder: Path) -> list[str]:
    rows = [{"instruction": text, "day": date(2023, 8, 1)} for text in ANIMALS + MONEY]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "synthetic.parquet")
    return ["--synthetic_file", str(folder / "synthetic.parquet")]


def half_a_pair(folder: Path) -> list[str]:
    rows = [{"instruction": text, "note": "\ud800"} for text in ANIMALS + MONEY]
    (folder / "surrogates.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return ["--synthetic_file", str(folder / "surrogates.jsonl")]


def infinity(folder: Path) -> list[str]:
    rows = [{"instruction": text, "score": math.inf} for text in ANIMALS + MONEY]
    (folder / "infinite.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return ["--synthetic_file", str(folder / "infinite.jsonl")]


def a_file_for_a_folder(folder: Path) -> list[str]:
    (folder / "taken").write_text("")
    return ["--output_dir", str(folder / "taken"), "--budget_file", str(folder / "out" / "budget.jsonl")]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (dates_in_parquet, "row 1 (counted from 1): cannot be written as JSON (TypeError)"),
        (half_a_pair, "row 1 (counted from 1): cannot be written as JSON (UnicodeEncodeError)"),
        (infinity, "row 1 (counted from 1): cannot be written as JSON (ValueError)"),
        (a_file_for_a_folder, "cannot be written to"),
    ],
)
def test_what_cannot_be_saved_is_found_before_it_costs(
    make: Callable[[Path], list[str]], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(folder, *make(folder))
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (folder / "out" / "budget.jsonl").exists()


def test_a_bad_record_is_named_by_row_and_not_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "real.jsonl", [{"instruction": "a"}, {"instruction": [SECRET]}])
    with pytest.raises(SystemExit):
        run(folder)
    error = capsys.readouterr().err
    assert "row 2" in error
    assert SECRET not in error


def test_a_user_that_is_a_list_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "real.jsonl", [{"instruction": "a", "u": "x"}, {"instruction": "b", "u": [SECRET]}])
    with pytest.raises(SystemExit):
        run(folder, "--privacy_unit", "u")
    error = capsys.readouterr().err
    assert "row 2 (counted from 1): u is neither text nor a number" in error
    assert SECRET not in error
