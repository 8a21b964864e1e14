"""Lines of a budget file: read as they were written, also by earlier versions; who entered them, and when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from dptune.accounting import Cut, Spend
from dptune.budget.stages import CLOSED, GAUSSIAN, LIMIT, STATED, TRAINING, WITHOUT, Stage, append_stage, read_stages

STAGES = [
    Stage("limit", "nobody", LIMIT, epsilon=8.0, delta=1e-6),
    Stage("run", "one row", TRAINING, ledger="run/ledger.jsonl", reserved=(Spend(1.0, 0.1, 9),), release="1"),
    Stage("cut", "one row", TRAINING, ledger="cut/ledger.jsonl", reserved=(Spend(1.0, 0.1, 9, 1, Cut(20, 99)),)),
    Stage("run", "one row", CLOSED, ledger="run/ledger.jsonl", reserved=(Spend(1.0, 0.1, 2),), release="1"),
    Stage("histogram", "one row", GAUSSIAN, noise_multiplier=10.0, release="a"),
    Stage("survey", "one row", STATED, epsilon=1.5, delta=0.0),
    Stage("leak", "nobody", WITHOUT, reason="no noise"),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage.stage}-{stage.kind}")
def test_what_is_read_is_what_was_written_with_who_and_when(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    append_stage(tmp_path / "register.jsonl", stage)
    (found,) = read_stages(tmp_path / "register.jsonl")
    assert found.content == stage.content
    assert found.who == "ada"
    assert found.when is not None
    assert found.when.startswith("20")


def test_a_line_of_an_earlier_version_has_nobody_who_entered_it(tmp_path: Path) -> None:
    line = {"stage": "histogram", "unit": "one row", "kind": "gaussian", "noise_multiplier": 10.0}
    (tmp_path / "budget.jsonl").write_text(json.dumps(line) + "\n")
    assert read_stages(tmp_path / "budget.jsonl") == [Stage(**line)]


def test_a_machine_that_knows_no_user_enters_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    append_stage(tmp_path / "register.jsonl", STAGES[0])
    assert read_stages(tmp_path / "register.jsonl")[0].who == "unknown"


@pytest.mark.parametrize(
    "change",
    [{"epsilon": None}, {"epsilon": -1.0}, {"epsilon": "8"}, {"delta": 1.0}, {"kind": "other"}, {"more": 1},
     {"reserved": [{"noise_multiplier": 0, "sampling_probability": 0.1, "steps": 1}]},
     {"reserved": [{"noise_multiplier": 1, "sampling_probability": 2, "steps": 1}]},
     {"reserved": [{"noise_multiplier": 1, "sampling_probability": 0.1, "steps": -9}]},
     {"reserved": [{"noise_multiplier": 1, "sampling_probability": 0.1, "steps": 1, "cut": [20, 99]}]},
     {"reserved": [{"sigma": 1}]}, {"reserved": 3}],
)  # fmt: skip
def test_a_line_that_would_make_epsilon_too_small_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    line: dict[str, object] = {"stage": "limit", "unit": "nobody", "kind": "limit", "epsilon": 8.0, "delta": 1e-6}
    path = tmp_path / "register.jsonl"
    path.write_text(json.dumps(line | change) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(InvalidArgument, match=r"register\.jsonl:1.*is not an entry"):
        read_stages(path)
