"""The sections show what they were given, and say how to read it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.html_page import HtmlPage
from utils.synthetic.arguments import HELD_OUT, REAL_TRAINING, UNTRAINED
from utils.synthetic.divergence import Divergence
from utils.synthetic.evaluation import Lengths, Overlap, Words
from utils.synthetic.overlap import Nearness
from utils.synthetic.page import Section, render
from utils.synthetic.passages import SharedPassage
from utils.synthetic.report import (
    divergence_section,
    lengths_section,
    overlap_section,
    proxy_section,
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


@pytest.fixture(scope="module")
def html(sections: list[Section]) -> str:
    return render("A title", "Not private: do not publish.", [f"{EVIL}: 5 texts"], sections, {"names": [EVIL]})


def test_every_number_is_shown(html: str) -> None:
    cells = HtmlPage(html).cells
    for cell in ("0.910 ± 0.020", "0.100", "5.0%", "1,234", "25.0%", "12.3", "1e-09", "0.1230 ± 0.0040", "4 (2.0%)",
                 "9 (4.5%)", "44", "0.750 ± 0.010", "–"):  # fmt: skip
        assert cell in cells, cell


def test_every_table_has_a_column_a_sample_and_something_to_read_it_by(sections: list[Section]) -> None:
    for section in sections:
        assert len(section.explanation) > 100
        assert section.rows
        assert all(len(cells) == len(section.columns) for _, cells in section.rows)
        assert section.plots
