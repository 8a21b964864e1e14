"""The site has the pages that the repository's pages link to, with links that work there, and all flags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.site_pages import PROGRAMS, ROOT, flags_page, outside_files, with_site_links
from utils.training.optimization_arguments import OptimizationArguments


def written(root: Path, pages: dict[str, str]) -> Path:
    for name, text in pages.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_linked_files_outside_docs_become_pages_and_so_do_those_that_they_link_to(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "README.md": "[a](docs/a.md) ![p](docs/p.svg)",
            "docs/a.md": "[data](../data/README.md#rows) [web](https://example.org/x.md)",
            "data/README.md": "[results](results.md) [gone](gone.md)",
            "data/results.md": "",
            "data/private.md": "nobody links here",
        },
    )
    assert outside_files(root) == ["README.md", "data/README.md", "data/results.md"]


@pytest.mark.parametrize(
    ("page", "link", "on_the_site"),
    [
        ("how_to/a.md", "../../data/README.md#rows", "../data/README.md#rows"),
        ("how_to/a.md", "../glossary.md", "../glossary.md"),
        ("how_to/a.md", "b.md", "b.md"),
        ("README.md", "docs/how_to/a.md", "how_to/a.md"),
        ("data/README.md", "../docs/how_to/a.md#x", "../how_to/a.md#x"),
        ("data/README.md", "../docs/images/p.svg", "../images/p.svg"),
        ("how_to/a.md", "#heading", "#heading"),
        ("how_to/a.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_lead_to_where_the_site_has_the_file(tmp_path: Path, page: str, link: str, on_the_site: str) -> None:
    root = written(tmp_path, {"README.md": "", "docs/how_to/a.md": "", "data/README.md": ""})
    assert with_site_links(f"see [it]({link}).", page, root) == f"see [it]({on_the_site})."


def test_every_flag_of_a_program_has_a_row_with_its_default() -> None:
    page = flags_page()
    training = page.partition("## train_clm.py")[2].partition("\n## ")[0]
    (row,) = [line for line in training.splitlines() if line.startswith("| `--max_grad_norm`")]
    assert f"`{OptimizationArguments.max_grad_norm}`" in row
    for program in PROGRAMS:
        assert program in page
    assert re.search(r"^\| `--train_file` \| ", page, flags=re.MULTILINE)
    assert "%%" not in page


def test_every_program_with_flags_is_in_the_page() -> None:
    """A new program needs a line in `PROGRAMS`; those of the demo, the tests and releases are left out."""
    own = {"prepare_demo", "release", "stub_endpoint"}
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py")}
    programs = {name for name, text in sources.items() if "import exit_on_invalid_argument" in text}
    assert {f"scripts.{name}" for name in programs - own} <= PROGRAMS.keys()
