"""The table of audited trainings has the bound of each adversary, and the noise is less while a training runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import audit_training
from dptune.noise import GaussianNoise

CONTRADICTED = 1


def test_each_trial_is_trained_with_its_noise_and_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(50)))
    spread: list[float] = []

    def run(program: str, words: Sequence[str]) -> int:
        folder = Path(words[words.index("--output_dir") + 1] if program == "train_clm" else words[1])
        released = torch.zeros(2000)
        with GaussianNoise(2000) as noise:
            noise.add_to(released, 1.0, grid=2.0**-30)
        if program == "train_clm":
            assert len((folder.parent / "rows.jsonl").read_text().splitlines()) == 10
            assert words[words.index("--per_device_train_batch_size") + 1] == "25"
            spread.append(float(released.std()))
            return 0
        assert released.std() > 0.9, "the noise is whole again"
        (folder / "audit" / "training").mkdir(parents=True)
        findings = [
            {"question": f"one training, {one}{kind}", "found": spread[-1]}
            for one in audit_training.ADVERSARIES
            for kind in ("", ", if it acts like a Gaussian")
        ]
        found = {"contradicted": spread[-1] < 0.9, "findings": findings}
        (folder / "audit" / "training" / "audit.json").write_text(json.dumps(found))
        return CONTRADICTED if found["contradicted"] else 0

    monkeypatch.setattr(audit_training, "_run", run)
    output = tmp_path / "result.md"
    given = ["--model_name_or_path", "a-model", "--train_file", str(file), "--output", str(output), "--rows", "10"]
    audit_training.main([*given, "--canaries", "20", "--dials", "20", "--trials", "2", "--epsilons", "3"])
    assert spread == pytest.approx([1, 1, 0.25, 0.25, 0, 0], abs=0.1)
    lines = [line for line in output.read_text().splitlines() if line.startswith("| 3 |")]
    assert [line.split("|")[2].strip() for line in lines] == ["as stated"] * 2 + ["a quarter"] * 2 + ["none"] * 2
    assert ["CONTRADICTED, status 1" in line for line in lines] == [False, False, True, True, True, True]
    assert "0.00 (0.00)" in lines[-1]


def test_a_program_runs_with_its_words_and_tells_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_program.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(int(sys.argv[1]))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.argv)
    assert audit_training._run("a_program", ["3"]) == 3
    assert audit_training._run("a_program", ["0"]) == 0
    assert sys.argv == before
    assert "['3']" in capsys.readouterr().out
