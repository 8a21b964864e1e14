"""A private selection keeps its draw, hides its trials and takes only those that it accounted for."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from dptune._validate import InvalidArgument
from tests.comparison_runs import accuracy, draw, files_of, select
from tests.trainer_stand_in import Trainer


def test_the_trials_are_secret_and_an_interrupted_selection_keeps_its_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, (0, 0.0), (1, 0.0), (2, 0.0))
    with pytest.raises(InvalidArgument, match="a trial failed"):
        select(tmp_path, trainer=Trainer(accuracy, stop_after=1))
    secret = tmp_path / ".secret-sst2"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o700
    assert not (tmp_path / "selected").exists()
    draw(monkeypatch, (5, 0.0))
    with pytest.raises(InvalidArgument, match="a selection with 'geometric' is in this folder"):
        select(tmp_path, name="poisson")
    trainer = select(tmp_path)
    ran = [(flags["finetune_mode"], flags["learning_rate"]) for flags in trainer.commands]
    assert ran == [("full", "0.001"), ("lora", "0.0001")]
    assert trainer.found == [False, False]  # what the interrupted trial released was seen by nobody: it starts afresh
    assert not secret.exists()
    assert select(tmp_path).commands == []  # done
    with pytest.raises(InvalidArgument, match="mean_trials=9"):
        select(tmp_path, "--mean_trials", "9")
    with pytest.raises(InvalidArgument, match=r"^seed=3: a selection with 0 is in this folder"):
        select(tmp_path, "--seeds", "3")
    release = tmp_path / "selected" / "sst2" / "selection.json"
    content = json.loads(release.read_text())
    del content["seed"]  # as earlier selections left it
    release.write_text(json.dumps(content))
    assert select(tmp_path).commands == []


def test_a_real_draw_is_a_selection(tmp_path: Path) -> None:
    trainer = select(tmp_path, "--mean_trials", "3", "--clip_norm", "0.5", "2")
    assert len(trainer.commands) >= 1
    content = json.loads((tmp_path / "selected" / "sst2" / "selection.json").read_text())
    assert len(content["candidates"]) == 12
    assert content["winner"] in content["candidates"]


def test_no_trial_is_an_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(monkeypatch)
    for _ in range(2):  # the second time it is still the outcome, whatever would be drawn
        assert select(tmp_path, name="poisson").commands == []
        assert "nothing is released. The budget is spent all the same" in capsys.readouterr().out
        draw(monkeypatch, (1, 0.0))
    assert files_of(tmp_path / "selected" / "sst2") == {"selection.json", "README.md"}
    assert json.loads((tmp_path / "selected" / "sst2" / "selection.json").read_text())["winner"] is None


@pytest.mark.parametrize(
    "changed",
    [
        {"noise_factor": 0.9},
        {"more_steps": 1},
        {"results": {"private": False}},
        {"results": {"epsilon": None}},
    ],
)
def test_a_trial_that_was_not_accounted_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    draw(monkeypatch, (1, 0.0))
    with pytest.raises(InvalidArgument, match=r"which is what epsilon is computed from|a trial has no guarantee"):
        select(tmp_path, trainer=Trainer(accuracy, **changed))
    assert not (tmp_path / "selected").exists()
