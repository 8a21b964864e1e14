"""A trial is one process; its results are read, its failures are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.comparison import trials
from utils.comparison.trials import run_in_process, run_trial

PROGRAM = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("training with", flags["--learning_rate"])
if flags["--learning_rate"] == "bad":
    sys.exit("error: no such rate")
if flags["--learning_rate"] != "lazy":
    folder = pathlib.Path(flags["--output_dir"]) / flags["--datasets"]
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"rate": flags["--learning_rate"]}))
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(trials, "TRAINER", path)


def test_the_results_of_a_process_are_read_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "trial-0"
    assert run_trial("sst2", folder, ["--learning_rate", "0.1"], run_in_process) == {"rate": "0.1"}
    assert (tmp_path / "out" / "trial-0.log").read_text() == "training with 0.1\n"
    (folder / "sst2" / "results.json").write_text(json.dumps({"rate": "kept"}))
    assert run_trial("sst2", folder, ["--learning_rate", "0.1"], run_in_process) == {"rate": "kept"}


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (
            "bad",
            r"trial='trial-1': train_classifier.py ended with status 1: error: no such rate \(full log: .*\.log\)",
        ),
        ("lazy", r"trial='trial-1': train_classifier.py wrote no .*results.json; see .*trial-1.log"),
    ],
)
def test_a_failure_is_named_with_the_last_line_of_its_log(tmp_path: Path, rate: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        run_trial("sst2", tmp_path / "trial-1", ["--learning_rate", rate], run_in_process)
    assert "training with" in (tmp_path / "trial-1.log").read_text()
