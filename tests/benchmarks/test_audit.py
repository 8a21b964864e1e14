"""The program that counts contradictions tells honest audits from faulty ones, sharded ranks included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import audit
from benchmarks.audit import SETTINGS, Outcome, Setting
from tests.benchmarks.comparing import rows_of

SHARDED = "whole model, two sharded ranks"


def short(setting: Setting) -> Setting:
    plan = replace(setting.plan, sampling_probability=1.0, steps=20, confidence=1 - 1e-6)
    return replace(setting, mechanism=replace(setting.mechanism, units=8), plan=plan)


@pytest.mark.parametrize(("fault", "contradicted"), [("", False), ("no noise", True)])
def test_an_audit_is_one_line_of_a_table(fault: str, contradicted: bool) -> None:
    outcome = audit.audit(short(SETTINGS["adapters"]), fault)
    assert (outcome.contradicted, bool(outcome.by)) == (contradicted, contradicted)
    assert outcome.seconds > 0


@pytest.mark.parametrize("fault", ["", "a shared key"])
def test_two_sharded_ranks_are_audited(fault: str) -> None:
    (outcome,) = audit.outcomes_of(short(SETTINGS[SHARDED]), 1, None, fault)
    assert outcome.contradicted == bool(fault)


def test_the_tables_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def outcomes_of(_setting: Setting, seeds: int, _pool: object, fault: str = "") -> list[Outcome]:
        return [Outcome(bool(fault), fault and "noise", 1.0 + number, 4.0, 0.5) for number in range(seeds)]

    monkeypatch.setattr(audit, "outcomes_of", outcomes_of)
    output = tmp_path / "audit.md"
    audit.main(["--seeds", "3", "--fault_seeds", "2", "--output", str(output)])
    honest, faulty = output.read_text().split("## With planted faults")
    assert rows_of(honest)["adapters"] == ["1", "0.1", "3", "0", "2.000", "3.000", "4.000", "0.50"]
    assert rows_of(faulty)["no noise"] == ["2", "2", "noise", "1.500", "4.000"]
    assert rows_of(honest).keys() >= SETTINGS.keys()
    audit.main(["--seeds", "1", "--fault_seeds", "0", "--settings", "adapters", "--output", str(output)])
    assert "none planted" in output.read_text()
