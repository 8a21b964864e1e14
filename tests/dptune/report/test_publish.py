"""What a run publishes: weights, report, card, ledger and a curve whose end is the report's epsilon, at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dptune.accounting import Spend, compose, epsilon
from dptune.ledger import Ledger
from dptune.report import publish as publishing
from dptune.report.card import LORA_ADAPTER
from dptune.report.publish import publish
from dptune.report.statement import PrivacyStatement
from tests.dptune.report.test_statement import not_private, private

SPEND: dict[str, Any] = {"noise_multiplier": 1.0, "sampling_probability": 0.1, "delta": 1e-5}
PRIVATE: dict[str, Any] = {**SPEND, "num_examples": 1000, "expected_batch_size": 100.0, "steps": 30}


def save(folder: Path) -> None:
    (folder / "lora_weights.bin").write_text("weights")


def published(folder: Path, statement: PrivacyStatement, save: Any = save, **how: Any) -> Path:
    how = {"ledger": None, "base_model": "a-model", "artifact": LORA_ADAPTER} | how
    return publish(folder, statement, save, **how)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("group_size", [1, 2])
def test_the_curve_ends_at_the_reports_epsilon(
    group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, float] = {}
    monkeypatch.setattr(
        publishing, "plot_epsilon", lambda _, steps, epsilons, __: drawn.update(zip(steps, epsilons, strict=True))
    )
    spent = epsilon(**SPEND, steps=30, group_size=group_size)
    published(tmp_path, private(**PRIVATE, epsilon=spent, group_size=group_size))
    assert (min(drawn), max(drawn), len(drawn)) == (1, 30, 20)
    assert drawn[30] == spent
    assert list(drawn.values()) == sorted(drawn.values())


def test_the_curve_of_noise_bands_follows_the_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, float] = {}
    monkeypatch.setattr(
        publishing, "plot_epsilon", lambda _, steps, epsilons, __: drawn.update(zip(steps, epsilons, strict=True))
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for steps in (1, 2):
        block = ledger.begin_block()
        for _ in range(steps):
            settings = {"noise_multiplier": 1.0, "sampling_probability": 0.1, "noise_bands": 2, "block": block}
            ledger.record(**settings, clip_norm=1.0, sampler="Poisson, cyclic")
    one, two, three = (compose([Spend(1.0, 0.2, turns)], delta=1e-5) for turns in (1, 2, 3))
    stated = private(**PRIVATE | {"steps": 3}, noise_bands=2, unused_steps=1, epsilon=three)
    published(tmp_path, stated, ledger=ledger)
    assert drawn == {1: one, 2: two, 3: two, 4: three}


def test_all_files_are_written_and_agree(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(noise_multiplier=1.0, sampling_probability=0.1, clip_norm=1.0)
    folder = published(tmp_path, private(**PRIVATE), ledger=ledger, settings={"style": "größer"})
    assert folder == tmp_path / "publish"
    about = {"privacy_report.json", "epsilon.png", "README.md", "ledger.jsonl", "dptune_settings.json", "SHA256SUMS"}
    assert names(folder) == {"lora_weights.bin", *about}
    assert names(tmp_path) == {"publish", "ledger.jsonl"}
    assert (folder / "ledger.jsonl").read_bytes() == (tmp_path / "ledger.jsonl").read_bytes()
    assert json.loads((folder / "dptune_settings.json").read_text()) == {"style": "größer"}
    assert json.loads((folder / "privacy_report.json").read_text())["epsilon"] == 2.25712345
    card = (folder / "README.md").read_text()
    assert "epsilon.png" in card
    (claimed,) = re.findall(r"ε = ([\d.]+) at", card)
    assert 2.25712345 <= float(claimed) < 2.27


def test_a_run_without_a_guarantee_has_no_plot(tmp_path: Path) -> None:
    folder = published(tmp_path, not_private())
    assert names(folder) == {"lora_weights.bin", "privacy_report.json", "README.md", "SHA256SUMS"}
    assert "epsilon.png" not in (folder / "README.md").read_text()


def test_the_folder_appears_at_once_and_an_error_leaves_the_earlier_one(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        save(folder)
        assert names(tmp_path / "publish") == before
        raise OSError("no space")

    folder = published(tmp_path, not_private())
    (folder / "of_the_first_end").touch()
    before = names(folder)
    with pytest.raises(OSError, match="no space"):
        published(tmp_path, not_private(), fails)
    assert names(folder) == before
    assert names(tmp_path) == {"publish"}
    published(tmp_path, not_private())
    assert names(folder) == before - {"of_the_first_end"}


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    half = tmp_path / ".publish.0123abcd.tmp"
    half.mkdir()
    (half / "lora_weights.bin").write_text("half")
    published(tmp_path, not_private())
    assert names(tmp_path) == {"publish"}
