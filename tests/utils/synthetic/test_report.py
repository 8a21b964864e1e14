"""The page says that it is not private, runs nothing, escapes names, and shows what it was given."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from utils.synthetic.arguments import HELD_OUT, REAL_TRAINING, UNTRAINED
from utils.synthetic.divergence import Divergence
from utils.synthetic.evaluation import Lengths, Overlap, Words
from utils.synthetic.overlap import Nearness
from utils.synthetic.passages import SharedPassage
from utils.synthetic.report import (
    Section,
    divergence_section,
    lengths_section,
    overlap_section,
    proxy_section,
    render,
    words_section,
)
from utils.synthetic.statistics import LengthComparison, VocabularyComparison

EVIL = '<script>alert("$x$")</script>'
NAMES = [EVIL, HELD_OUT]
LENGTHS = LengthComparison(12.3, (1, 2, 3, 4, 5), 1.5, 0.2, 1e-9)


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    curve = np.array([[1, 0], [0.9, 0.8], [0, 1]])
    divergence = Divergence(0.91, 0.02, 0.92, 0.1, 0.05, 0.0, 7, curve)
    vocabulary = VocabularyComparison(1234, 0.25, 0.5, (0.1, 0.2, float("nan")), 0.3)
    words = Words(5000, dict.fromkeys(NAMES, vocabulary), dict.fromkeys(NAMES, np.array([0.5, 0.3, 0.2])))
    lengths = Lengths(dict.fromkeys(NAMES, LENGTHS), LENGTHS, dict.fromkeys(NAMES, np.array([0, 3, 900])))
    proxy = {"accuracy": 0.123, "accuracy_error": 0.004, "nats_per_token": 5.0, "bits_per_byte": 1.9}
    nearness = Nearness((3.0, 8.0, 44.0), 0.75, 0.01)
    found = [(-1, SharedPassage(0, 0, -1))]
    overlap = Overlap(200, 4, 9, nearness, nearness, np.array([0.1, 1.0]), np.array([0, 44]), found)
    return [
        divergence_section(dict.fromkeys(NAMES, divergence), 70),
        words_section(words),
        lengths_section(lengths, "words"),
        proxy_section(dict.fromkeys([EVIL, REAL_TRAINING, UNTRAINED], proxy), "A model."),
        overlap_section(dict.fromkeys(NAMES, overlap), 20, "memorised.jsonl"),
    ]


class Page(HTMLParser):
    """Tags, cells and images of a page; complains of tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += [value for name, value in attrs if name == "src" and value]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture(scope="module")
def html(sections: list[Section]) -> str:
    return render("Not private: do not publish.", [f"{EVIL}: 5 texts"], sections, {"names": [EVIL]})


def test_the_warning_stands_before_everything_else_and_in_the_title(html: str) -> None:
    body = html[html.index("<body>") + len("<body>") :].strip()
    assert body.startswith('<p class="warning"><strong>Not private: do not publish.</strong></p>')
    assert re.search("<title>[^<]*not private</title>", html)


def test_names_are_escaped_everywhere_and_no_script_can_run(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert EVIL in page.cells  # as text
    assert "<script" not in html
    assert "default-src 'none'" in html
    for image in page.images:
        svg = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,"))
        assert svg.startswith(b"<?xml")
        assert b"<script" not in svg


def test_the_page_needs_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert len(page.images) == 6
    assert all(image.startswith("data:") for image in page.images)
    assert not {"link", "iframe", "a"} & set(page.tags)
    assert "url(" not in html


def test_every_number_is_shown(html: str) -> None:
    cells = Page(html).cells
    for cell in ("0.910 ± 0.020", "0.100", "5.0%", "1,234", "25.0%", "12.3", "1e-09", "0.1230 ± 0.0040", "4 (2.0%)",
                 "9 (4.5%)", "44", "0.750 ± 0.010", "–"):  # fmt: skip
        assert cell in cells, cell


def test_every_table_has_a_column_a_sample_and_something_to_read_it_by(sections: list[Section]) -> None:
    for section in sections:
        assert len(section.explanation) > 100
        assert section.rows
        assert all(len(cells) == len(section.columns) for _, cells in section.rows)
        assert section.plots
