"""Checksums list every file but those left out, and tell which file is another one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dptune import InvalidArgument
from dptune.report.checksums import CHECKSUMS_NAME, require_checksums, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    (tmp_path / "adapter" / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("to fill in")
    write_checksums(tmp_path, but=("README.md",))
    return tmp_path


def test_all_files_but_the_card_are_listed(folder: Path) -> None:
    listed = [line.split("  ")[1] for line in (folder / CHECKSUMS_NAME).read_text().splitlines()]
    assert listed == ["adapter/config.json", "weights.bin"]
    (folder / "README.md").write_text("filled in")
    assert require_checksums(folder) == {"adapter/config.json", "weights.bin"}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs the program sha256sum")
def test_the_usual_program_reads_them(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", CHECKSUMS_NAME]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    (folder / "weights.bin").write_text("others")
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1


def test_a_changed_or_missing_file_is_named(folder: Path) -> None:
    (folder / "weights.bin").write_text("others")
    with pytest.raises(InvalidArgument, match=r"file='weights\.bin': is not the file that the run left"):
        require_checksums(folder)
    (folder / "weights.bin").unlink()
    with pytest.raises(InvalidArgument, match=r"file='weights\.bin': is listed in SHA256SUMS but missing"):
        require_checksums(folder)
