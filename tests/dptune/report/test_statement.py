"""The privacy report: its keys, its refusals to contradict itself, and nothing that was measured on the data."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dptune import GaussianNoise, Keystream, Ledger, PrivacyConfig
from dptune.report import statement as report
from dptune.report.statement import (
    PrivacyStatement,
    read_privacy_report,
    state_privacy,
    versions,
    write_privacy_report,
)
from dptune.sampling import Parts

REQUIRED_KEYS = [
    "epsilon", "delta", "noise_multiplier", "clip_norm", "clipping", "sampling_probability", "expected_batch_size",
    "steps",
    "repeated_steps", "unused_steps", "num_examples", "sampled", "privacy_unit", "method", "group_size", "adjacency",
    "accountant", "sampler", "noise_source", "guarantee", "reasons", "starts_from", "versions", "parts", "max_batch",
    "noise_bands",
    "average",
]  # fmt: skip

SETTINGS: dict[str, Any] = {
    "epsilon": 2.25712345,
    "delta": 1e-7,
    "noise_multiplier": 1.2,
    "clip_norm": 0.75,
    "sampling_probability": 2048 / 75329,
    "expected_batch_size": 2048.0,
    "steps": 184,
    "repeated_steps": 0,
    "num_examples": 75329,
    "privacy_unit": "one training example",
    "adjacency": "add or remove one privacy unit",
    "accountant": "PLD (dp-accounting)",
    "sampler": "Poisson, fresh secret randomness at every step",
    "noise_source": "keystream keyed from the operating system",
    "guarantee": "dp",
}


def private(**changes: Any) -> PrivacyStatement:
    """A statement with a guarantee."""
    return PrivacyStatement(**{**SETTINGS, **changes})


def not_private(**changes: Any) -> PrivacyStatement:
    """A statement without one."""
    without = {"guarantee": "none", "epsilon": None, "reasons": ["the noise seed was fixed by hand"]}
    return PrivacyStatement(**{**SETTINGS, **without, **changes})


def _read(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_the_report_has_the_required_keys_and_no_other(tmp_path: Path) -> None:
    write_privacy_report(tmp_path / "privacy_report.json", private())
    written = _read(tmp_path / "privacy_report.json")
    assert list(written) == REQUIRED_KEYS
    assert {key: written[key] for key in SETTINGS} == SETTINGS
    assert written["reasons"] == []


def test_without_a_guarantee_epsilon_is_null_and_the_reasons_are_listed(tmp_path: Path) -> None:
    statement = not_private(noise_multiplier=None, clip_norm=None, reasons=["no noise", "no clipping"])
    write_privacy_report(tmp_path / "r.json", statement)
    written = _read(tmp_path / "r.json")
    assert list(written) == REQUIRED_KEYS
    assert written["epsilon"] is written["noise_multiplier"] is written["clip_norm"] is None
    assert (written["guarantee"], written["reasons"]) == ("none", ["no noise", "no clipping"])


@pytest.mark.parametrize(
    "changes",
    [
        {"reasons": ["the noise seed was fixed"]},
        {"guarantee": "none", "epsilon": None},
        {"guarantee": "none", "epsilon": None, "reasons": [""]},
        {"guarantee": "none", "reasons": ["the noise seed was fixed"]},
        {"guarantee": "none", "epsilon": 0.0, "reasons": ["the noise seed was fixed"]},
        {"guarantee": "maybe"},
        {"epsilon": None},
        {"epsilon": float("inf")},
        {"epsilon": float("nan")},
        {"epsilon": -1.0},
        {"delta": None},
        {"delta": 0.0},
        {"delta": 1.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": None},
        {"clip_norm": None},
        {"clip_norm": float("inf")},
        {"repeated_steps": -1},
        {"repeated_steps": 185},
        {"guarantee": "none", "epsilon": None, "reasons": ["the noise seed was fixed"], "repeated_steps": 185},
        {"sampling_probability": 0.5},
        {"group_size": 0},
        {"group_size": 75330},
        {"parts": Parts((75000, 329), (1.0, 2.0))},
        {"max_batch": 2047},
        {"sampling_probability": 1.5, "expected_batch_size": 1.5 * 75329},
    ],
)
def test_a_statement_that_contradicts_itself_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        private(**changes)


@pytest.mark.parametrize("repeated", [0, 1, 184])
def test_repeated_steps_are_stated(tmp_path: Path, repeated: int) -> None:
    write_privacy_report(tmp_path / "r.json", private(repeated_steps=repeated))
    assert _read(tmp_path / "r.json")["repeated_steps"] == repeated


@pytest.mark.parametrize("secret", [True, False])
def test_noise_under_a_key_that_is_known_guarantees_nothing(secret: bool, tmp_path: Path) -> None:
    config = PrivacyConfig(
        num_examples=100, expected_batch_size=4.0, steps=3, clip_norm=1.0, noise_multiplier=2.0, delta=1e-4
    )
    with GaussianNoise(4, Keystream.from_os() if secret else Keystream.for_tests(0)) as noise:
        stated = state_privacy(config, Ledger(tmp_path / "ledger.jsonl"), noise, privacy_unit="one row")
    assert (stated.guarantee, stated.epsilon) == (("dp", 0.0) if secret else ("none", None))
    assert any("fixed key" in reason for reason in stated.reasons) is not secret


@pytest.mark.parametrize(
    ("noise_multiplier", "delta", "guarantee", "accountant"),
    [(2.0, 1e-4, "dp", "PLD"), (2.0, 1e-18, "dp", "RDP"), (1e-200, 1e-4, "none", "Gaussian")],
)
def test_the_accountant_is_the_one_that_gave_epsilon_and_an_infinite_one_guarantees_nothing(
    noise_multiplier: float, delta: float, guarantee: str, accountant: str, tmp_path: Path
) -> None:
    config = PrivacyConfig(
        num_examples=100,
        expected_batch_size=4.0,
        steps=3,
        clip_norm=1.0,
        noise_multiplier=noise_multiplier,
        delta=delta,
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(noise_multiplier=noise_multiplier, sampling_probability=0.04, clip_norm=1.0)
    with GaussianNoise(4) as noise:
        stated = state_privacy(config, ledger, noise, privacy_unit="one row")
    assert stated.guarantee == guarantee
    assert stated.accountant.startswith(accountant)
    assert stated.reasons == (() if guarantee == "dp" else ("the noise is so small that epsilon is infinite",))
    write_privacy_report(tmp_path / "r.json", stated)


def test_steps_are_the_ledgers_with_the_repeated_ones_among_them(tmp_path: Path) -> None:
    config = PrivacyConfig(
        num_examples=100, expected_batch_size=4.0, steps=3, clip_norm=1.0, noise_multiplier=2.0, delta=1e-4
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for _ in range(5):
        ledger.record(noise_multiplier=2.0, sampling_probability=0.04, clip_norm=1.0)
    with GaussianNoise(4) as noise:
        plain = state_privacy(config, ledger, noise, privacy_unit="one row")
        stated = state_privacy(config, ledger, noise, privacy_unit="one row", repeated_steps=2)
        with pytest.raises(AssertionError, match="6 of 5 steps repeated"):
            state_privacy(config, ledger, noise, privacy_unit="one row", repeated_steps=6)
    assert (plain.steps, plain.repeated_steps) == (5, 0)
    assert (stated.steps, stated.repeated_steps) == (5, 2)
    assert stated.epsilon == plain.epsilon == ledger.epsilon(1e-4)
    assert stated.epsilon > config.planned_epsilon()


def test_the_refusal_does_not_depend_on_assert_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -O` removes assert statements; the module is compiled in the same way here."""
    path = Path(report.__file__)
    optimized = types.ModuleType("optimized_report")
    optimized.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "optimized_report", optimized)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", optimize=1), optimized.__dict__)
    assert optimized.PrivacyStatement(**SETTINGS).guarantee == "dp"
    with pytest.raises(AssertionError):
        optimized.PrivacyStatement(**{**SETTINGS, "reasons": ["the noise seed was fixed"]})


def test_a_statement_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        private().epsilon = 0.1  # type: ignore[misc]


def test_a_number_that_is_not_json_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_privacy_report(path, private())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_privacy_report(path, not_private(clip_norm=float("nan")))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_versions_name_what_ran() -> None:
    import torch

    found = versions(["numpy", "no-such-distribution"])
    assert list(found) == ["python", "torch", "dp-accounting", "dptune", "numpy", "no-such-distribution"]
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # PyPI leaves +cu130 out
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["dptune"][0].isdigit()
    assert found["no-such-distribution"] == "not installed"


def test_steps_that_did_not_run_count_as_if_they_had(tmp_path: Path) -> None:
    """What ends a run early depends on its steps, so only the bound of the whole plan holds."""
    config = PrivacyConfig(
        num_examples=100, expected_batch_size=10, steps=5, clip_norm=1, noise_multiplier=1, delta=1e-3
    )
    whole, short = Ledger(tmp_path / "whole"), Ledger(tmp_path / "short")
    for ledger, steps in ((whole, 5), (short, 2)):
        for _ in range(steps):
            ledger.record(noise_multiplier=1.0, sampling_probability=0.1, clip_norm=1.0)
    with GaussianNoise(1) as noise:
        every = state_privacy(config, whole, noise, privacy_unit="x")
        early = state_privacy(config, short, noise, privacy_unit="x", unused_steps=3)
        fewer = state_privacy(config, short, noise, privacy_unit="x")
    assert early.epsilon == every.epsilon
    assert (fewer.epsilon or 0) < (every.epsilon or 0)
    assert (early.steps, early.unused_steps) == (2, 3)


def weighted() -> PrivacyStatement:
    """A statement of a run whose examples had weights."""
    parts = Parts((329, 75000), (1.0, 2.0))
    return private(parts=parts, sampling_probability=2048 / (329 / 2 + 75000))


def test_the_sizes_and_weights_of_parts_are_in_the_report(tmp_path: Path) -> None:
    write_privacy_report(tmp_path / "r.json", weighted())
    assert _read(tmp_path / "r.json")["parts"] == {"sizes": [329, 75000], "weights": [1.0, 2.0]}
    assert read_privacy_report(tmp_path / "r.json") == weighted()
