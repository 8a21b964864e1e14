"""What goes into an image, and how the project is cited, follows the project."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def allowed() -> list[str]:
    """The patterns that .dockerignore lets into an image."""
    first, *others = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    return [line.removeprefix("!").rstrip("/") for line in others if line.startswith("!")]


def in_image(path: str) -> bool:
    return any(path == one or path.startswith(f"{one}/") or fnmatch.fnmatch(path, one) for one in allowed())


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout: git lists no files")
    return listed.stdout.split()


def test_every_pattern_names_something() -> None:
    assert [one for one in allowed() if not (ROOT / one).exists()] == []


def test_the_image_has_the_programs_and_no_file_that_a_user_adds() -> None:
    files = tracked()
    programs = [
        one for one in files if one.endswith(".py") and one.partition("/")[0] not in ("tests", "benchmarks", "docs")
    ]
    assert len(programs) > 150
    assert [one for one in programs if not in_image(one)] == []
    for private in (
        "my.jsonl",
        "data/my.jsonl",
        "data/pubmed/a.xml.gz",
        "out/publish/README.md",
        ".demo/x",
        ".git/config",
    ):
        assert not in_image(private)


def test_the_dockerfile_copies_only_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) ", text, flags=re.MULTILINE)
    assert copied == ["requirements.txt", "."]
    assert 'ENTRYPOINT ["dptune"]' in text


def test_the_citation_has_the_version_and_the_licence() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (PROJECT["version"], PROJECT["license"])
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
