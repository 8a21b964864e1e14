"""What tells that a folder holds a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune import InvalidArgument
from dptune.ledger import begin_ledger
from dptune.run.folder import refuse_existing_run


@pytest.mark.parametrize("name", ["ledger.jsonl", "publish", "privacy_report.json", "lora_weights.bin", "callers_own"])
def test_each_trace_of_a_run_is_enough_and_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("something")
    with pytest.raises(InvalidArgument, match=rf"^run_folder=.*holds a run already \({name}\); give another folder"):
        refuse_existing_run(tmp_path, ["callers_own"])


def test_a_folder_without_a_run_is_taken(tmp_path: Path) -> None:
    refuse_existing_run(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("not a run's")
    begin_ledger(tmp_path / "ledger.jsonl")  # entered in a budget, and still empty
    refuse_existing_run(tmp_path, ["callers_own"])
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "ledger.jsonl"}
