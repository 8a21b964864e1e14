"""What is released is the winner alone, whole, and does not tell how many trials there were."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dptune.run.lock import LOCK_NAME
from tests.comparison_runs import draw, files_of, select
from tests.trainer_stand_in import MEASURED, VALIDATION
from utils.comparison import selection as private_selection


def test_only_the_winner_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are full, lora and last-layer, each with 1e-4 and 1e-3; noise makes the second trial win."""
    draw(monkeypatch, (1, -20.0), (2, 30.0), (5, 0.0), (1, -10.0))
    trainer = select(tmp_path)
    assert [flags["finetune_mode"] for flags in trainer.commands] == ["full", "lora", "last-layer", "full"]
    assert all("enable_dp" in flags for flags in trainer.commands)
    selected = tmp_path / "selected" / "sst2"
    assert files_of(tmp_path) - {LOCK_NAME} == {
        "settings.json", "selected/sst2/selection.json", "selected/sst2/README.md", "selected/sst2/model.safetensors",
    }  # fmt: skip
    assert (selected / "model.safetensors").read_text() == "lora 0.0001"
    content = json.loads((selected / "selection.json").read_text())
    assert content["winner"] == {"mode": "lora", "learning_rate": 1e-4, "clip_norm": MEASURED}
    assert content["noisy_accuracy"] == pytest.approx((round(0.71 * VALIDATION) + 30) / VALIDATION)
    card = (selected / "README.md").read_text()
    assert "| lora | 0.0001 | 7 | 0.860 |" in card
    assert "last-layer |" not in card


def test_a_release_is_on_the_disk_before_its_trials_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, (1, 0.0))
    synced, kept = set(), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    remove = shutil.rmtree

    def removing(folder: Path, **how: Any) -> None:
        released = tmp_path / "selected" / "sst2"
        if released.exists():
            kept.append({path.stat().st_ino for path in [released.parent, *released.rglob("*")]} <= synced)
        remove(folder, **how)

    monkeypatch.setattr(private_selection.shutil, "rmtree", removing)
    select(tmp_path)
    assert kept == [True]


def test_what_is_released_does_not_tell_how_many_trials_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, times = [], set()
    for number, losers in enumerate(([], [(4, -50.0)] * 7)):
        draw(monkeypatch, *losers, (1, 0.0))
        select(tmp_path / str(number))
        selected = tmp_path / str(number) / "selected" / "sst2"
        texts.append([(selected / name).read_text() for name in ("selection.json", "README.md")])
        times |= {path.stat().st_mtime for path in [selected, *selected.rglob("*")]}
    assert texts[0] == texts[1]
    assert len(times) == 1
