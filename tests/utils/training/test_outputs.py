"""What a run leaves: its settings, its final figures, and lines that say where everything is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dptune.run.session import PrivateRun
from tests.tasks import TinyTask, plan
from utils.training import outputs
from utils.training.outputs import CONFIG_NAME, RESULTS_NAME, finish_run, summarise_run, write_config

STEP: dict[str, Any] = {"seconds": 2.0, "tokens": 100}
ROWS = [{"step": 0, "eval_loss": 5.0}, *({"step": n, "loss": 10.0 - n, **STEP} for n in range(1, 13))]


def test_settings_are_written_as_json(tmp_path: Path) -> None:
    write_config(tmp_path, {"prompt": "größer", "clip_norm": 1.0})
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == {"prompt": "größer", "clip_norm": 1.0}


def test_figures_are_of_all_steps_and_the_loss_of_the_last_ten() -> None:
    found = summarise_run([*ROWS, {"step": 13, "eval_loss": 4.0, "loss": -3.0, **STEP}], per_token=True)
    assert (found["steps"], found["seconds"], found["tokens"], found["tokens_per_second"]) == (13, 26.0, 1300, 50.0)
    assert found["train_loss"] == pytest.approx(sum(range(-3, 7)) / 10)
    assert (found["eval_loss_before"], found["eval_loss"], found["perplexity"]) == (5.0, 4.0, math.exp(4.0))
    assert "perplexity" not in summarise_run(ROWS, per_token=False)


def test_a_loss_beyond_all_numbers_has_a_finite_perplexity() -> None:
    assert math.isfinite(summarise_run([{"step": 1, "eval_loss": 1e6}], per_token=True)["perplexity"])


def test_nothing_measured_is_nothing_told() -> None:
    found = summarise_run([{"step": 0}, {"step": 1}], per_token=True)
    assert found == {"steps": 1, "seconds": 0, "tokens": 0, "tokens_per_second": None, "train_loss": None}


def test_the_end_is_told_with_what_must_not_be_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(outputs, "plot_diagnostics", lambda path, *_, **__: drawn.append(path))
    run = PrivateRun(plan(private=False), tmp_path)
    finish_run(run, TinyTask(), [*ROWS, {"step": 13, "eval_loss": 4.0}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("privacy                NONE: ")
    assert lines[1] == "held-out loss          5.0000 before, 4.0000 after"
    assert lines[2].startswith("not private            ")
    assert lines[3] == f"privacy report         {tmp_path / 'publish' / 'privacy_report.json'}"
    assert lines[4] == f"adapter                {tmp_path / 'publish'}"
    assert lines[5:] == [f"ended in               {tmp_path}"]
    assert drawn == [tmp_path / "diagnostics.png"]
    assert json.loads((tmp_path / RESULTS_NAME).read_text())["eval_loss"] == 4.0
