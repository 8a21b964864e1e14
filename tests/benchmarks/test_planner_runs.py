"""The runs of studies as the lines that the planner's rule is fitted to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fit_planner import read_runs
from benchmarks.planner_runs import main
from dptune.bands import INDEPENDENT, best_bands

RUN: dict[str, Any] = {
    "contender": "whole",
    "chosen": {"max_train_steps": 25, "learning_rate": 3e-3},
    "seed": 7,
    "loss_start": 5.0373,
    "loss": 2.79219,
    "noise_multiplier": 0.032,
    "noise_bands": 1,
    "expected_batch_size": 64,
    "steps": 25,
    "key": json.dumps({"flags": {"block_size": 32, "learning_rate": 1.0}, "seed": 7}),
}


def write(path: Path, *runs: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs))
    return str(path)


def test_each_run_is_a_line_with_the_noise_of_its_sums(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", RUN), write(tmp_path / "b.jsonl", RUN | {"noise_bands": 8, "chosen": {}})]
    main([*files, "--model", "tiny", "--trained", "260032", "--output", str(tmp_path / "runs.csv")])
    independent, correlated = read_runs(tmp_path / "runs.csv")
    assert independent == {
        "model": "tiny",
        "trained": "260032",
        "rows_tokens": "32",
        "steps": "25",
        "noise_batch_ratio": "0.0005",
        "bands": "1",
        "rate": "0.003",
        "seed": "7",
        "loss_start": "5.0373",
        "loss_end": "2.7922",
    }
    sums = 0.0005 * best_bands(8, 25).error(25) / INDEPENDENT.error(25)
    assert float(correlated["noise_batch_ratio"]) == pytest.approx(sums, rel=1e-3)
    assert sums < 0.0003
    assert (correlated["bands"], correlated["rate"]) == ("8", "1"), "a rate that was not searched for counts too"


@pytest.mark.parametrize("lacking", ["noise_multiplier", "loss", "loss_start"])
def test_a_run_without_noise_or_losses_is_refused(
    lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", RUN, RUN | {lacking: None})
    with pytest.raises(SystemExit):
        main([file, "--model", "tiny", "--trained", "1", "--output", str(tmp_path / "runs.csv")])
    assert "runs='whole': needs noise and a held-out loss" in capsys.readouterr().err
    assert not (tmp_path / "runs.csv").exists()
