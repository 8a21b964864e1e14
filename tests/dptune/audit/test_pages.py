"""The files of an audit agree, and one that tells of rows says that it is not private."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dptune.audit.checks import Finding
from dptune.audit.pages import NOT_PRIVATE, SIMULATED, Page, page_as_markdown, write_page

FINDINGS = (
    Finding("one step", 5.0, 4.0, True, "epsilon, at least", 1000),
    Finding("noise", 1.1, 1.0, False, "standard deviation", 20),
)
PAGE = Page(
    kind="mechanism",
    verdict="CONTRADICTED: x",
    contradicted=True,
    epsilon=5.0,
    stated_epsilon=4.0,
    delta=1e-5,
    confidence=0.99,
    findings=FINDINGS,
    settings={"games": 7},
    private=True,
)


def test_the_files_hold_what_was_found(tmp_path: Path) -> None:
    write_page(tmp_path / "deep" / "audit", PAGE)
    folder = tmp_path / "deep" / "audit"
    assert sorted(path.name for path in folder.iterdir()) == ["audit.json", "audit.md", "audit.png"]
    found = json.loads((folder / "audit.json").read_text())
    assert (found["verdict"], found["epsilon"], found["stated_epsilon"], found["confidence"]) == (
        PAGE.verdict,
        5,
        4,
        0.99,
    )
    assert found["findings"][0]["question"] == "one step"
    assert {"dptune", "torch", "scipy"} <= found["versions"].keys()
    page = (folder / "audit.md").read_text()
    assert "| one step | epsilon, at least | 5 | 4 | 1,000 | **CONTRADICTED** |" in page
    assert "| noise | standard deviation | 1.1 | 1 | 20 | no contradiction |" in page
    assert "| games | 7 |" in page
    assert (folder / "audit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("private", "note"), [(True, SIMULATED), (False, NOT_PRIVATE)])
def test_a_page_says_whether_it_may_be_published(private: bool, note: str, tmp_path: Path) -> None:
    page = replace(PAGE, private=private)
    write_page(tmp_path, page)
    assert note in page_as_markdown(page, with_plot=False)
    assert json.loads((tmp_path / "audit.json").read_text())["note"] == note


def test_without_a_bound_on_epsilon_there_is_no_picture(tmp_path: Path) -> None:
    write_page(tmp_path, replace(PAGE, findings=FINDINGS[1:]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.json", "audit.md"]
    assert "audit.png" not in (tmp_path / "audit.md").read_text()
