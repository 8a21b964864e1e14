"""Diagnostics, progress bar and results: strict JSON, marked as not private, and readable after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils.training.log import NOTICE, RunLog, StepMetrics, read_diagnostics, summarise, write_all_results


def _metrics(step: int, **changes: Any) -> StepMetrics:
    values = {"loss": 3.0 - step / 10, "batch_drawn": 7, "tokens": 1000, "seconds": 0.5, "epsilon": step / 10}
    return StepMetrics(step=step, **{**values, **changes})


def _lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "diagnostics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]


def test_the_first_line_says_not_private_and_each_step_has_one_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, 2) as log:
        assert _lines(tmp_path) == [{"notice": NOTICE}], "said before anything is measured"
        log.record(StepMetrics(step=0, eval_loss=3.5))
        log.record(_metrics(1, learning_rate=3e-4, clipped_fraction=0.0, eval_loss=3.4))
        log.record(_metrics(2))
    assert "NOT PRIVATE" in NOTICE
    assert "do not publish" in NOTICE
    notice, *rows = _lines(tmp_path)
    assert notice == {"notice": NOTICE}
    assert rows[0] == {"step": 0, "eval_loss": 3.5}
    assert rows[1] == {
        "step": 1, "loss": 2.9, "clipped_fraction": 0.0, "batch_drawn": 7, "tokens": 1000, "seconds": 0.5,
        "learning_rate": 3e-4, "epsilon": 0.1, "eval_loss": 3.4,
    }  # fmt: skip
    assert "eval_loss" not in rows[2]
    assert log.rows == rows == read_diagnostics(tmp_path / "diagnostics.jsonl")


def test_a_step_is_on_disk_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 2)
    log.record(_metrics(1))
    assert _lines(tmp_path)[-1]["step"] == 1


def test_a_loss_that_is_not_finite_is_null_not_absent(tmp_path: Path) -> None:
    with RunLog(tmp_path, 2) as log:
        log.record(_metrics(1, loss=float("nan")))
        log.record(_metrics(2, loss=None))
    assert _lines(tmp_path)[1]["loss"] is None
    assert "loss" not in _lines(tmp_path)[2]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLog(tmp_path, 1) as log:
            log.record(StepMetrics(step=0, eval_loss=3.5))
            log.record(_metrics(1))
    assert [row.get("step") for row in _lines(tmp_path)] == [None, 0, 1]


def test_a_resumed_run_keeps_what_its_checkpoint_knows_and_drops_the_rest(tmp_path: Path) -> None:
    with RunLog(tmp_path, 4) as log:
        for step in (1, 2, 3):
            log.record(_metrics(step))
    with (tmp_path / "diagnostics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a crash
    with RunLog(tmp_path, 4, start_step=2) as log:
        log.record(_metrics(3, loss=9.0))
    assert [(row.get("step"), row.get("loss")) for row in _lines(tmp_path)] == [
        (None, None), (1, 2.9), (2, 2.8), (3, 9.0),
    ]  # fmt: skip
    assert log.rows == _lines(tmp_path)[1:]


def test_the_bar_shows_epsilon_loss_and_tokens_per_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 3) as log:
        log.record(_metrics(1))
        log.record(_metrics(2, tokens=5000))
        log.record(_metrics(3, eval_loss=1.25))
    shown = capsys.readouterr().err
    assert "3/3" in shown
    for part in ("epsilon=0.300", "loss=2.700", "held_out=1.250", "tokens/s=4,667"):
        assert part in shown, part


def test_without_privacy_the_bar_shows_no_epsilon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 1) as log:
        log.record(_metrics(1, epsilon=None))
    shown = capsys.readouterr().err
    assert "loss=" in shown
    assert "epsilon" not in shown


def test_other_ranks_write_print_and_track_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 1, is_main=False, track=lambda *_: pytest.fail("tracked")) as log:
        log.record(_metrics(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_tracker_gets_each_step(tmp_path: Path) -> None:
    seen: list[tuple[dict[str, Any], int]] = []
    with RunLog(tmp_path, 1, track=lambda values, step: seen.append((values, step))) as log:
        log.record(StepMetrics(step=1, loss=2.0, epsilon=0.1))
    assert seen == [({"loss": 2.0, "epsilon": 0.1}, 1)]


def test_the_summary_of_a_step() -> None:
    norms = torch.arange(101, dtype=torch.float32)
    summary = summarise(torch.tensor([1.0, 4.0]), norms, norms > 80, clip_norm=80.0)
    expected = {
        "loss": 2.5, "grad_norm_p10": 10, "grad_norm_p50": 50, "grad_norm_p90": 90, "grad_norm_max": 100,
        "clipped_fraction": 20 / 101, "clip_norm": 80,
    }  # fmt: skip
    assert summary == pytest.approx(expected)
    assert all(type(value) is float for value in summary.values())
    StepMetrics(step=1, **summary)


def test_the_summary_of_an_empty_draw_and_of_a_step_without_privacy() -> None:
    nothing = torch.empty(0)
    assert summarise(nothing, nothing, nothing, 1.0) == {"clip_norm": 1.0}
    assert summarise(torch.tensor([2.0]), nothing, nothing, None) == {"loss": 2.0}


def test_all_results_say_first_that_they_are_not_private(tmp_path: Path) -> None:
    results = {
        "eval_loss": np.float32(1.5),
        "perplexity": float("inf"),
        "steps": torch.tensor(7),
        "list": [1.0, np.nan],
    }
    write_all_results(tmp_path / "all_results.json", results)
    text = (tmp_path / "all_results.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert written == {"notice": NOTICE, "eval_loss": 1.5, "perplexity": None, "steps": 7, "list": [1.0, None]}
    assert next(iter(written)) == "notice"
