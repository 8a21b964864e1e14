"""The ledger counts what is on disk, survives a torn line, and refuses what is no ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dptune import InvalidArgument, Ledger, accounting
from dptune.accounting import Spend

STEP: dict[str, float] = {"noise_multiplier": 0.9, "sampling_probability": 0.02, "clip_norm": 0.5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def written(path: Path, steps: int) -> Ledger:
    ledger = Ledger(path)
    for _ in range(steps):
        ledger.record(**STEP)
    return ledger


def test_nothing_recorded_is_nothing_spent(path: Path) -> None:
    ledger = Ledger(path)
    assert (ledger.steps, ledger.spends, ledger.epsilon(1e-5), ledger.running_epsilon(1e-5)) == (0, [], 0, 0)
    assert not path.exists()


def test_each_line_is_on_disk_when_record_returns(path: Path) -> None:
    ledger = Ledger(path)
    for step in (1, 2, 3):
        ledger.record(**STEP)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == ledger.steps == step
        assert lines[-1] == {"step": step, **STEP}


def test_reopening_counts_and_goes_on(path: Path) -> None:
    written(path, 3)
    again = Ledger(path)
    assert again.steps == 3
    again.record(**STEP)
    assert Ledger(path).spends == [Spend(0.9, 0.02, 4)]
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 4


@pytest.mark.parametrize("torn", ['{"step": 3, "noise_mul', "{", '{"step": 3, "noise_multiplier": 0.9}'])
def test_a_torn_last_line_is_dropped_and_writing_goes_on(path: Path, torn: str) -> None:
    """Its gradient was never used: a line counts once its end is on disk."""
    written(path, 2)
    with path.open("a") as file:
        file.write(torn)
    again = Ledger(path)
    assert again.steps == 2
    again.record(**STEP)
    assert Ledger(path).steps == 3
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "",
        "[1, 2]",
        "7",
        '{"step": 2, "noise_multiplier": 0.9}',
        '{"step": 2, "noise_multiplier": "many", "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": null, "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": NaN, "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": -0.9, "sampling_probability": 0.02}',
        '{"step": 2, "noise_multiplier": 0.9, "sampling_probability": 0}',
        '{"step": 2, "noise_multiplier": 0.9, "sampling_probability": 1.5}',
        '{"step": 3, "noise_multiplier": 0.9, "sampling_probability": 0.02}',
    ],
)
def test_a_line_that_is_no_entry_is_refused_with_its_number(path: Path, line: str) -> None:
    written(path, 1)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InvalidArgument) as caught:
        Ledger(path)
    assert f"{path}:2" in str(caught.value)
    assert "restore the file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ledger_that_lost_a_line_is_refused(path: Path) -> None:
    """It would count less than was spent."""
    written(path, 3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    with pytest.raises(InvalidArgument, match=r"ledger\.jsonl:2"):
        Ledger(path)


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00garbage\n")
    with pytest.raises(InvalidArgument, match=r"ledger\.jsonl:1"):
        Ledger(path)


def test_epsilon_of_mixed_settings_composes_all_of_them(path: Path) -> None:
    ledger = written(path, 3)
    other: dict[str, Any] = {"noise_multiplier": 0.7, "sampling_probability": 0.05, "clip_norm": 0.5}
    ledger.record(**other)
    ledger.record(**STEP)
    spends = [Spend(0.9, 0.02, 4), Spend(0.7, 0.05, 1)]
    assert ledger.spends == Ledger(path).spends == spends
    epsilon = ledger.epsilon(1e-5)
    assert epsilon == accounting.compose(spends, delta=1e-5)
    assert epsilon > accounting.compose(spends[:1], delta=1e-5)
    assert epsilon <= ledger.running_epsilon(1e-5) <= 1.01 * epsilon


def test_a_line_that_cannot_be_written_is_not_counted(path: Path) -> None:
    ledger = Ledger(path)
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        ledger.record(**STEP)
    assert ledger.steps == 0
