"""The program: files, exit statuses, and mistakes on one line before anything is played."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.audit_faults import FAULTS
from dptune.audit.__main__ import _DTYPES, main
from dptune.audit.games import DTYPES
from dptune.audit.training import Canaries, write_canaries
from tests.dptune.audit.test_settings import run_with
from tests.dptune.report.test_check import private_run
from tests.dptune.report.test_statement import private

FLAGS = ["--noise_multiplier", "1", "--sampling_probability", "1", "--delta", "1e-5"]
SMALL = ["--steps", "20", "--confidence", "0.999999"]


def run(*argv: str) -> int:
    """The exit status of the program."""
    try:
        main(argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_flags_are_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["mechanism", *FLAGS, *SMALL, "--run_steps", "5", "--output_dir", str(tmp_path / "a")]
    assert run(*line, "--clipping", "automatic") == 0
    assert capsys.readouterr().out.endswith("\nno contradiction\n")
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert found["settings"]["clipping"] == "Automatic(gamma=0.01)"
    assert found["settings"]["steps of the run"] == 5
    assert not found["contradicted"]


def test_a_run_is_audited_into_its_folder(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", private(), "model.safetensors")
    assert run("mechanism", str(folder), *SMALL) == 0
    found = json.loads((folder / "audit" / "audit.json").read_text())
    assert found["stated_epsilon"] == private().epsilon
    assert found["settings"]["trained"] == "whole"
    assert found["epsilon"] is None or found["epsilon"] > 0


def test_a_contradiction_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FAULTS["rows counted twice"][0]():
        assert run("mechanism", *FLAGS, *SMALL, "--output_dir", str(tmp_path)) == 1
    assert "CONTRADICTED: " in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_text())["contradicted"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--sampling_probability", "1", "--delta", "1e-5"], "--noise_multiplier=None: give it, or the folder"),
        (FLAGS, "--output_dir=None: give a folder"),
        (["out", *FLAGS], "--noise_multiplier=1.0: the run's own is audited"),
        (["no_such_folder"], "RUN='no_such_folder': holds no privacy_report.json"),
        ([*FLAGS, "--output_dir", "x", "--steps", "5"], "--steps=5: give a whole number of at least 20"),
        ([*FLAGS, "--output_dir", "x", "--composed_steps", "999"], "--composed_steps=999: must be at most half"),
        ([*FLAGS, "--output_dir", "x", "--ranks", "0"], "--ranks=0: give a whole number"),
        ([*FLAGS, "--output_dir", "x", "--noise_multiplier", "-1"], "--noise_multiplier=-1.0: give a finite number"),
        ([*FLAGS, "--output_dir", "x", "--clip_norm", "1e-30"], "--clip_norm=1e-30: give a number from"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("mechanism", *argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {told}")
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())


def trained_with(folder: Path, signal: float) -> Path:
    """A run of three steps whose adversary sees each canary's coin by so much."""
    private_run(folder)
    generator = np.random.default_rng(0)
    included = generator.integers(0, 2, 400).astype(bool)
    scores = {"loss": signal * included + generator.normal(size=400)}
    write_canaries(folder / "audit" / "canaries.json", Canaries(included, scores))
    return folder


@pytest.mark.parametrize(("signal", "status"), [(0.0, 0), (20.0, 1)])
def test_a_training_is_audited(signal: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained_with(tmp_path, signal)
    assert run("training", str(folder)) == status
    found = json.loads((folder / "audit" / "training" / "audit.json").read_text())
    assert found["note"].startswith("NOT PRIVATE")
    assert found["contradicted"] == bool(status)
    (plain,) = [one for one in found["findings"] if one["question"] == "one training, loss"]
    assert plain["stated"] == pytest.approx(found["stated_epsilon"])
    assert "one training, loss: epsilon, at least" in capsys.readouterr().out


def test_a_run_without_canaries_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private_run(tmp_path)
    assert run("training", str(tmp_path)) == 2
    assert "canaries.json': cannot be read (No such file or directory); train with" in capsys.readouterr().err


def test_the_flag_offers_the_dtypes_that_are_audited() -> None:
    assert _DTYPES == DTYPES
