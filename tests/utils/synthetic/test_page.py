"""The page says that it is not private, runs nothing, escapes names, and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest

from tests.html_page import HtmlPage
from utils.synthetic.page import Plot, Section, render
from utils.synthetic.plots import plot_lengths

EVIL = '<script>alert("$x$")</script>'


@pytest.fixture(scope="module")
def html() -> str:
    plot = Plot(plot_lengths({EVIL: np.array([1, 2, 3])}, EVIL), EVIL)
    sections = [Section(EVIL, EVIL, [EVIL], [(EVIL, [EVIL])], [plot])]
    return render("A title", "Not private: do not publish.", [f"{EVIL}: 5 texts"], sections, {"names": [EVIL]})


def test_the_warning_stands_before_everything_else_and_in_the_title(html: str) -> None:
    body = html[html.index("<body>") + len("<body>") :].strip()
    assert body.startswith('<p class="warning"><strong>Not private: do not publish.</strong></p>')
    assert re.search("<title>A title: not private</title>", html)


def test_names_are_escaped_everywhere_and_no_script_can_run(html: str) -> None:
    page = HtmlPage(html)
    assert "script" not in page.tags
    assert EVIL in page.cells  # as text
    assert "<script" not in html
    assert "default-src 'none'" in html
    for image in page.images:
        svg = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,"))
        assert svg.startswith(b"<?xml")
        assert b"<script" not in svg


def test_the_page_needs_nothing_from_elsewhere(html: str) -> None:
    page = HtmlPage(html)
    assert len(page.images) == 1
    assert all(image.startswith("data:") for image in page.images)
    assert not {"link", "iframe", "a"} & set(page.tags)
    assert "url(" not in html
