"""The table shows the best settings of each mode; what choosing costs counts every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from dptune.accounting import Spend, compose
from dptune.accounting.selection import PrivateSelection
from tests.comparison_runs import STEPS, Q, accuracy, compare, table
from tests.trainer_stand_in import Trainer


def test_every_mode_rate_and_privacy_is_trained_and_the_best_rate_of_each_is_shown(tmp_path: Path) -> None:
    trainer = compare(tmp_path)
    ran = {(flags["finetune_mode"], flags["learning_rate"], "enable_dp" in flags) for flags in trainer.commands}
    assert len(trainer.commands) == len(ran) == 12
    assert table(tmp_path) == {
        "full": ["1,000,000", "0.001", "7", "0.800", "0.0001", "0.900", "+0.100", "0.510"],
        "lora": ["8,000", "0.001", "7", "0.760", "0.0001", "0.860", "+0.100", "0.510"],
        "last-layer": ["130", "0.001", "7", "0.600", "0.0001", "0.700", "+0.100", "0.510"],
    }
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert {(line["mode"], str(line["learning_rate"]), line["private"]) for line in lines} == ran
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_averaged_and_the_baseline_can_be_left_out(tmp_path: Path) -> None:
    trainer = compare(tmp_path, "--seeds", "0", "1", "2", "--no_baseline", "--modes", "lora")
    assert len(trainer.commands) == 6
    assert table(tmp_path) == {"lora": ["8,000", "0.001", "7", "0.770 ± 0.010 (3)", "-", "-", "-", "0.510"]}


def test_clip_norms_are_tried_in_private_runs_and_the_best_is_shown(tmp_path: Path) -> None:
    trainer = Trainer(lambda ran: 0.7 + 0.1 * (ran.clip_norm == 2) + 0.01 * (ran.rate == 1e-3))
    compare(tmp_path, "--modes", "lora", "--clip_norm", "0.5", "2", trainer=trainer)
    private = [flags for flags in trainer.commands if "enable_dp" in flags]
    assert {(flags["learning_rate"], flags["clip_norm"]) for flags in private} == {
        ("0.0001", "0.5"), ("0.0001", "2.0"), ("0.001", "0.5"), ("0.001", "2.0"),
    }  # fmt: skip
    assert len({flags["output_dir"] for flags in trainer.commands}) == len(trainer.commands) == 6
    assert all("clip_norm" not in flags for flags in trainer.commands if "enable_dp" not in flags)
    assert table(tmp_path) == {"lora": ["8,000", "0.001", "2", "0.810", "0.001", "0.710", "-0.100", "0.510"]}
    assert "the best of up to 4 on" in (tmp_path / "comparison.md").read_text()


def test_the_report_says_what_choosing_costs(tmp_path: Path) -> None:
    compare(tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    costs = [line.strip("| ").split("|") for line in text.split("### What choosing costs")[1].splitlines()]
    figures = {
        cells[0].strip(): float(cells[1]) for cells in costs if len(cells) == 2 and cells[1].strip()[0].isdigit()
    }
    spent = {m: compose([Spend(0.8, Q, m * STEPS)], delta=1e-6) for m in (1, 2, 6)}
    selection = PrivateSelection("poisson", 6, 5.0).epsilon(Spend(0.8, Q, STEPS), 1e-6)
    expected = {
        "one run whose settings were fixed beforehand": spent[1],
        "the best of one mode's runs (2, of full)": spent[2],
        "the best of all runs (6), or anything else chosen by this table": spent[6],
        "one model by private selection, 6 trials on average, the same noise": selection,
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert value <= figures[name] <= value + 0.01
    assert "exact counts on validation records" in text


def test_steps_that_a_crash_repeated_are_counted(tmp_path: Path) -> None:
    compare(tmp_path, "--modes", "full", trainer=Trainer(accuracy, more_steps=5))
    cost = compose([Spend(0.8, Q, 2 * (STEPS + 5))], delta=1e-6)
    (shown,) = (
        line for line in (tmp_path / "comparison.md").read_text().splitlines() if "best of one mode's runs (2, " in line
    )
    assert cost <= float(shown.split("|")[2]) <= cost + 0.01


def test_a_ledger_that_lost_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"has 19 of 20 steps, so epsilon would be too small"):
        compare(tmp_path, trainer=Trainer(accuracy, more_steps=-1))


def test_runs_without_a_guarantee_have_no_cost(tmp_path: Path) -> None:
    compare(tmp_path, "--no_baseline", trainer=Trainer(accuracy, results={"epsilon": None}))
    text = (tmp_path / "comparison.md").read_text()
    assert "a fixed noise seed and no guarantee" in text
    assert "| published |" not in text
