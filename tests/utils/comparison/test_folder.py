"""Trials in one folder share their settings, and all that was spent in it is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from dptune.accounting import Spend, compose
from tests.comparison_runs import STEPS, Q, accuracy, best_of_all, compare, draw, select, table
from tests.trainer_stand_in import Trainer
from utils.comparison.outcomes import SETTINGS_NAME


@pytest.mark.parametrize("changed", [["--num_train_epochs", "3"], ["--target_epsilon", "2"], ["--", "--lora_r", "4"]])
def test_a_folder_of_other_settings_is_refused(tmp_path: Path, changed: list[str]) -> None:
    compare(tmp_path, "--modes", "lora")
    with pytest.raises(InvalidArgument, match=r"the trials in .* have .*; give that, or another --output_dir"):
        compare(tmp_path, "--modes", "lora", *changed)


def test_a_folder_of_a_version_with_the_older_names_is_known(tmp_path: Path) -> None:
    compare(tmp_path, "--modes", "lora")
    path, older = tmp_path / SETTINGS_NAME, {"num_train_epochs": "epochs", "model_name_or_path": "model_checkpoint"}
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({older.get(name, name): value for name, value in saved.items()}))
    assert compare(tmp_path, "--modes", "lora").commands == []
    with pytest.raises(InvalidArgument, match=r"^--num_train_epochs=3.0: the trials in .* have 2.0; give that"):
        compare(tmp_path, "--modes", "lora", "--num_train_epochs", "3")


def test_a_second_line_adds_its_trials_and_their_cost(tmp_path: Path) -> None:
    """First two modes with one seed, then one of them with three more at one rate."""
    compare(tmp_path, "--modes", "lora", "last-layer")
    trainer = compare(
        tmp_path, "--modes", "lora", "--learning_rates", "1e-4", "--seeds", "0", "1", "2", "--no_baseline"
    )
    assert len(trainer.commands) == 2
    assert table(tmp_path) == {  # the rate with most seeds, though the other scored higher with its one
        "lora": ["8,000", "0.0001", "7", "0.720 ± 0.010 (3)", "0.0001", "0.860", "+0.140", "0.510"],
        "last-layer": ["130", "0.001", "7", "0.600", "0.0001", "0.700", "+0.100", "0.510"],
    }
    text = (tmp_path / "comparison.md").read_text()
    assert "the best of one mode's runs (4, of lora)" in text
    assert "the best of all runs (6)" in text


def test_a_trial_that_did_not_end_is_counted(tmp_path: Path) -> None:
    """And of others only those that took a step."""
    compare(tmp_path, "--no_baseline", "--modes", "full", "lora")
    trials = tmp_path / "trials" / "sst2"
    (trials / "full_lr0.001_private_seed0" / "sst2" / "results.json").unlink()
    for name in ("lora_lr0.001_private_seed7", "last-layer_lr0.001_private_seed0"):
        (trials / name / "sst2").mkdir(parents=True)
    (trials / "lora_lr0.001_private_seed7" / "sst2" / "ledger.jsonl").write_text("")
    begun = json.dumps({"step": 1, "noise_multiplier": 0.5, "sampling_probability": Q})
    (trials / "last-layer_lr0.001_private_seed0" / "sst2" / "ledger.jsonl").write_text(f"{begun}\n")
    compare(tmp_path, "--no_baseline", "--modes", "lora")
    runs, spent = best_of_all(tmp_path)
    expected = compose([Spend(0.8, Q, 4 * STEPS), Spend(0.5, Q, 1)], delta=1e-6)
    assert runs == "3 and 2 unfinished"
    assert expected <= spent <= expected + 0.01
    runs = (tmp_path / "comparison.md").read_text().partition("one mode's runs (")[2].partition(")")[0]
    assert runs == "2, of lora"


def test_a_private_selection_in_the_same_folder_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(monkeypatch, (1, 0.0), (2, 0.0))
    told = "This folder also holds a private selection on the same records. Add its cost to each row: epsilon"
    with pytest.raises(InvalidArgument, match="a trial failed"):
        select(tmp_path, "--target_epsilon", "5", trainer=Trainer(accuracy, stop_after=1))
    for _ in range(2):  # first it is interrupted, then done
        compare(tmp_path, "--target_epsilon", "5")
        assert f"{told} 5.00 and delta 0.0001." in (tmp_path / "comparison.md").read_text()
        select(tmp_path, "--target_epsilon", "5")
    compare(tmp_path / "other")
    assert told not in (tmp_path / "other" / "comparison.md").read_text()
