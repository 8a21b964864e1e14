"""What is published beside a model: the report, the card and a curve whose end is the report's epsilon."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dptune.accounting import epsilon
from dptune.report import publish as publishing
from dptune.report.card import LORA_ADAPTER
from dptune.report.publish import publish
from tests.dptune.report.test_statement import not_private, private

SPEND: dict[str, Any] = {"noise_multiplier": 1.0, "sampling_probability": 0.1, "delta": 1e-5}
PRIVATE: dict[str, Any] = {**SPEND, "num_examples": 1000, "expected_batch_size": 100.0, "steps": 30}


@pytest.mark.parametrize("group_size", [1, 2])
def test_the_curve_ends_at_the_reports_epsilon(
    group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, float] = {}
    monkeypatch.setattr(
        publishing, "plot_epsilon", lambda _, steps, epsilons, __: drawn.update(zip(steps, epsilons, strict=True))
    )
    spent = epsilon(**SPEND, steps=30, group_size=group_size)
    statement = private(**PRIVATE, epsilon=spent, group_size=group_size)
    publish(tmp_path, statement, base_model="a-model", artifact=LORA_ADAPTER)
    assert (min(drawn), max(drawn), len(drawn)) == (1, 30, 20)
    assert drawn[30] == spent
    assert list(drawn.values()) == sorted(drawn.values())


def test_all_three_files_are_written_and_agree(tmp_path: Path) -> None:
    publish(tmp_path, private(**PRIVATE), base_model="a-model", artifact=LORA_ADAPTER)
    assert {path.name for path in tmp_path.iterdir()} == {"privacy_report.json", "epsilon.png", "README.md"}
    assert json.loads((tmp_path / "privacy_report.json").read_text())["epsilon"] == 2.25712345
    card = (tmp_path / "README.md").read_text()
    assert "epsilon.png" in card
    (claimed,) = re.findall(r"ε = ([\d.]+) at", card)
    assert 2.25712345 <= float(claimed) < 2.27


def test_a_run_without_a_guarantee_has_no_plot(tmp_path: Path) -> None:
    publish(tmp_path, not_private(), base_model="a-model", artifact=LORA_ADAPTER)
    assert {path.name for path in tmp_path.iterdir()} == {"privacy_report.json", "README.md"}
    assert "epsilon.png" not in (tmp_path / "README.md").read_text()
