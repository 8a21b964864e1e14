"""A release is tagged only if every file states its version; the tag's message is the changelog's section."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts import release
from scripts.release import require_version, section_of

CHANGELOG = """# Changelog

## [Unreleased]

- Later.

## [0.2.0] - 2026-12-01

### Added

- # is no comment here.

## [0.1.0]

- First.
"""


def git(root: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *who, *words], cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dptune").mkdir()
    (tmp_path / "dptune" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    for key, value in (("NAME", "a"), ("EMAIL", "a@example.org")):
        monkeypatch.setenv(f"GIT_COMMITTER_{key}", value)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    return tmp_path


def test_the_tag_holds_the_section_of_the_changelog(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release.main(["0.2.0", "--dry_run"])
    assert git(root, "tag") == ""
    release.main(["0.2.0"])
    assert "tagged v0.2.0" in capsys.readouterr().out
    assert git(root, "tag", "--list", "--format=%(contents)", "v0.2.0").strip() == (
        "dptune 0.2.0\n\n### Added\n\n- # is no comment here."
    )


@pytest.mark.parametrize(
    ("version", "file", "text", "told"),
    [
        ("0.2", None, "", "give three numbers"),
        ("0.3.0", None, "", "pyproject.toml states 0.2.0"),
        ("0.2.0", "CITATION.cff", "version: 0.1.0\n", "CITATION.cff states 0.1.0"),
        ("0.2.0", "dptune/__init__.py", "", "dptune/__init__.py states none"),
        ("0.2.0", "CHANGELOG.md", "## [Unreleased]\n", "CHANGELOG.md has no section"),
        ("0.2.0", "CHANGELOG.md", "## [0.2.0]\n\n## [0.1.0]\n- First.\n", "CHANGELOG.md has no section"),
        ("0.2.0", "new.txt", "a", "not committed"),
    ],
)
def test_what_is_not_ready_is_refused(
    root: Path, version: str, file: str | None, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if file is not None:
        (root / file).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        release.main([version])
    assert told in capsys.readouterr().err
    assert git(root, "tag") == ""


def test_a_tag_is_not_moved(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(root, "tag", "v0.2.0")
    with pytest.raises(SystemExit, match="2"):
        release.main(["0.2.0"])
    assert "exists" in capsys.readouterr().err


def test_the_project_itself_states_one_version() -> None:
    real = Path(__file__).resolve().parents[2]
    require_version(real, "0.1.0")
    assert section_of(real, "Unreleased")
