"""The page, the JSON file and the printed table show the same figures, and say that they are not private."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.html_page import HtmlPage
from utils.attacks.copied import compare_copies
from utils.attacks.exposure import Exposure
from utils.attacks.membership import LOSS, MIN_K, REFERENCE, START
from utils.attacks.report import ATTACK_NOTICE, JSON_NAME, PAGE_NAME, printed, write_attack
from utils.attacks.results import ROWS, Findings, FoundSecret, Membership


@pytest.fixture
def findings() -> Findings:
    generator = np.random.default_rng(0)
    names = (LOSS, REFERENCE, MIN_K, START)
    return Findings(
        epsilon=1.00001,
        delta=1e-5,
        profile=((1.00001, 1e-5),),
        unit="one training example",
        membership=[Membership(ROWS, *({name: generator.normal(size=n) for name in names} for n in (50, 500)))],
        known=3,
        secrets=[FoundSecret(4, Exposure(2, 1001), Exposure(400, 1001))],
        copied=compare_copies(["a b c"], ["a b"], ["c"]),
    )


def test_everything_is_written_and_marked(findings: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.attacks.plots.drawn_image", lambda *_, **__: "data:,")
    write_attack(tmp_path, findings, {"run": "<b>out</b>"})
    html = (tmp_path / PAGE_NAME).read_text()
    assert html.index(ATTACK_NOTICE) < html.index("<h1>")
    assert "<b>out" not in html
    page = HtmlPage(html)
    assert {"loss of the start model", "needs 1,000 held out", "2.7%", "2 of 1,001", "9.0", "1.3"} <= set(page.cells)
    assert len(page.images) == 3
    content = json.loads((tmp_path / JSON_NAME).read_text())
    assert content["not_private"] == ATTACK_NOTICE
    rows = content["membership"][ROWS]
    assert (rows["members"], rows["others"]) == (50, 500)
    assert rows["attacks"][LOSS]["caught"][1] is None
    assert content["allowed"][0]["caught"] == pytest.approx(0.0272, abs=1e-4)
    assert content["secrets"][0]["rank"] == 2
    assert content["copied"]["longest_train"] == 2
    assert content["contradictions"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGE_NAME, JSON_NAME]


def test_the_printed_table_tells_it_in_short(findings: Findings) -> None:
    lines = printed(findings)
    assert lines[0].startswith("privacy                epsilon 1.0001 at delta 1e-05, for one training example")
    assert lines[1] == "rows                   50 of the training, 500 held out; 3 more left out, which were trained on"
    assert any(line.startswith("most that epsilon allows") and "2.7%" in line for line in lines)
    assert any("in 4 training rows: rank 2 of 1001, 9.0 bits" in line for line in lines)
    assert any(
        line.startswith("longest passage        2 words with a training row, 1 with a held-out") for line in lines
    )
    assert any(line.startswith("verdict                ") for line in lines)
