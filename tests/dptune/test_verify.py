"""The verifier passes what a run left, and refuses what was changed, with exit status 2 and one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dptune import InvalidArgument
from dptune.report.card import LORA_ADAPTER
from dptune.report.publish import publish
from dptune.verify import main, verify
from tests.dptune.report.test_check import private_run, save
from tests.dptune.report.test_statement import not_private

pytestmark = pytest.mark.usefixtures("no_plots")


def finished_run(run: Path) -> Path:
    run.mkdir()
    return private_run(run)


def test_a_run_a_published_folder_and_a_download_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_run(tmp_path / "run")
    copy = Path(shutil.copytree(folder, tmp_path / "download"))
    for path in (tmp_path / "run", folder, copy):
        main([str(path)])
        out = capsys.readouterr().out
        assert "ledger                 3 steps: the same epsilon, computed again" in out
        assert out.endswith("verified\n")


def test_a_change_is_one_line_and_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_run(tmp_path / "run")
    ledger = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(ledger[:-1]))
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ledger=")
    assert told.err.count("\n") == 1


def test_what_holds_is_told_before_a_path_that_keeps_it_from_being_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_run(tmp_path / "run")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in sums if "adapter_config" not in line))
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    told = capsys.readouterr()
    assert "3 steps: the same epsilon, computed again" in told.out
    assert "verified" not in told.out
    assert "is a path on this machine; resume the finished run with base_model_name=NAME" in told.err


def test_another_accountant_is_named(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    assert not any("accountant" in line for line in verify(folder))
    report = json.loads((folder / "privacy_report.json").read_text())
    report["versions"]["dp-accounting"] = "0.1"
    (folder / "privacy_report.json").write_text(json.dumps(report))
    with pytest.raises(InvalidArgument, match=r"'privacy_report\.json': is not the file that the run left"):
        verify(folder)
    sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in sums if "privacy_report" not in line))
    assert any("dp-accounting 0.1 then" in line for line in verify(folder))


def test_a_model_without_a_guarantee_needs_the_flag(tmp_path: Path) -> None:
    folder = publish(tmp_path, not_private(), save, ledger=None, base_model="ann/base", artifact=LORA_ADAPTER)
    with pytest.raises(InvalidArgument, match=r"states no guarantee .*--without_privacy"):
        verify(folder)
    assert verify(folder, without_privacy=True)[0].startswith("privacy                NONE: ")


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"FOLDER=.*is no folder"):
        verify(tmp_path / "none")


def test_the_module_runs(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    done = subprocess.run([sys.executable, "-m", "dptune.verify", folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
