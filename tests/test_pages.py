"""What the pages name exists: links and their headings, paths, modules, programs; lines are of at most 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("dptune", "utils", "tests", "scripts", "benchmarks", "docs", "accelerate_configs", "recipes", "notebooks")
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "data/*.md", "benchmarks/**/*.md", "scripts/**/*.md")
    for path in ROOT.glob(pattern)
)
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
_FILE = re.compile(r"(?<![\w./*-])(?:[\w-]+/)*\w+\.(?:py|sh|cfg)\b")
_MODULE = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS[:5])})(?:\.\w+)+")
_PROGRAM = re.compile(r"python -m ([a-z_]\w*(?:\.\w+)*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PLACEHOLDER = re.compile(r"/(?:NAME|labelled_)")
_NOT_OURS = {"venv", "pip", "pytest", "script.py"}  # python -m venv; the reader's own script


def sources() -> list[str]:
    """Paths of everything that a page may name, from the root."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path.relative_to(ROOT).as_posix() for path in [*found, *ROOT.glob("*.*")]]


def missing_names(text: str, known: list[str]) -> Iterator[str]:
    """Paths, files, modules and programs in a page that are not there."""
    paths, ends = set(known), {f"/{path}" for path in known}
    for path in _PATH.findall(text):
        if path.rstrip("/") not in paths and not _PLACEHOLDER.search(path):
            yield path
    for file in _FILE.findall(text):
        if file not in _NOT_OURS and not any(path.endswith(f"/{file}") for path in ends):
            yield file
    for name in [*_MODULE.findall(text), *_PROGRAM.findall(text)]:
        if not name.endswith((".py", ".sh", ".md")) and name not in _NOT_OURS and not _is_module_or_name(name):
            yield name


def _is_module_or_name(name: str) -> bool:
    """Whether it is a module, a package, or something that a module's source mentions."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        sources = [place.with_suffix(".py"), place / "__init__.py"]
        if any(source.is_file() for source in sources) or (place.is_dir() and count == len(parts)):
            text = "".join(source.read_text() for source in sources if source.is_file())
            return all(re.search(rf"\b{part}\b", text) for part in parts[count : count + 1])
    return False


def broken_links(page: Path) -> Iterator[str]:
    """Links of a page to files that are not there, or to headings that the file lacks."""
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in headings(target.read_text(encoding="utf-8"))):
            yield link


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert sorted(set(missing_names(page.read_text(encoding="utf-8"), sources()))) == []
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", [page for page in PAGES if "results" not in page.parts], ids=lambda page: page.name)
def test_lines_of_a_page_have_at_most_100_columns(page: Path) -> None:
    if page == ROOT / "scripts" / "nlg_reddit" / "README.md":
        pytest.skip("its launch line is one line, as a test of that program reads it")
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|") and "](" not in line] == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("see `dptune/run/session.py` and `dptune/units/`", []),
        ("see `utils/proxy_model.py`", ["utils/proxy_model.py", "utils/proxy_model.py"]),
        ("see `group_accounting.py` and `run/plan.py`", ["group_accounting.py"]),
        ("from dptune.accounting.selection import PrivateSelection; dptune.PrivacyConfig", []),
        ("from dptune.selection import PrivateSelection", ["dptune.selection"]),
        ("python -m dptune.budget, python -m scripts.annotate, python -m scripts.anotate", ["scripts.anotate"] * 2),
    ],
)
def test_a_name_that_does_not_exist_is_found(text: str, missing: list[str]) -> None:
    assert list(missing_names(text, sources())) == missing


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title: two\n[a](#a-title-two) [b](other.md) [c](#elsewhere) [d](https://example.org)\n")
    assert list(broken_links(page)) == ["other.md", "#elsewhere"]
