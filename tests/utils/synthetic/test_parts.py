"""The parts of a comparison: what each gives for the file and the page, and where passages may be quoted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.utils.synthetic.test_evaluation import compare, draw
from utils.synthetic import parts as module
from utils.synthetic.arguments import NO_PROXY, ProxyArguments, StatisticsArguments, TextArguments
from utils.synthetic.parts import JSON_NAME, MEMORISED_NAME, PAGE_NAME, evaluate, proxy_part, write
from utils.synthetic.proxy_results import EVALUATION_NOTICE
from utils.synthetic.texts import Comparison

STATISTICS = StatisticsArguments(bootstrap=5, passage_words=6, embedding_dimensions=8)
WITHOUT_MODELS = ProxyArguments(proxy_model=NO_PROXY)


@pytest.fixture(scope="module")
def copied() -> tuple[Comparison, list[str]]:
    """A sample of which half are training rows."""
    train = draw(5, 40)
    return compare({"copy": train[:20] + draw(6, 40)}, train), train


def texts(folder: Path) -> TextArguments:
    return TextArguments(synthetic_file=["s.jsonl"], held_out_file="h.jsonl", output_dir=str(folder))


def parts_of(folder: Path, comparison: Comparison) -> list[Any]:
    return list(evaluate(folder, comparison, texts(folder), STATISTICS, WITHOUT_MODELS))


def test_every_part_is_json_and_has_sections(copied: tuple[Comparison, list[str]], tmp_path: Path) -> None:
    found = parts_of(tmp_path, copied[0])
    assert [name for name, _, _ in found] == ["divergence", "vocabulary", "lengths", "overlap"]
    assert all(sections for _, _, sections in found)
    json.dumps([plain for _, plain, _ in found])
    assert found[3][1]["copy"]["copies"] == 20


def test_training_rows_are_quoted_in_one_file_that_forbids_publishing(
    copied: tuple[Comparison, list[str]], tmp_path: Path
) -> None:
    comparison, train = copied
    write(tmp_path, comparison, parts_of(tmp_path, comparison), {"seed": 0})
    first, *rows = (json.loads(line) for line in (tmp_path / MEMORISED_NAME).read_text().splitlines())
    assert first == {"not_private": module.MUST_NOT_BE_PUBLISHED}
    assert len(rows) >= 20
    for name in (JSON_NAME, PAGE_NAME):
        content = (tmp_path / name).read_text()
        assert EVALUATION_NOTICE in content
        assert not any(row in content for row in train)
    assert list(json.loads((tmp_path / JSON_NAME).read_text()))[:4] == [
        "not_private",
        "settings",
        "texts_a_column",
        "samples",
    ]


def test_without_training_rows_an_older_list_of_passages_goes(tmp_path: Path) -> None:
    (tmp_path / MEMORISED_NAME).write_text("of an earlier run")
    found = parts_of(tmp_path, compare({"one": draw(7, 60)}))
    assert [name for name, _, _ in found] == ["divergence", "vocabulary", "lengths"]
    assert not (tmp_path / MEMORISED_NAME).exists()


def test_models_are_trained_as_their_flags_say_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, asked = compare({"one": draw(7, 60)}), list[Any]()
    monkeypatch.setattr(
        module, "train_proxies", lambda _, __, settings, most: asked.append((settings.steps, most)) or []
    )
    monkeypatch.setattr(module, "proxy_section", lambda results, told: (results, told))
    ((name, results, ((_, told),)),) = proxy_part(tmp_path, comparison, ProxyArguments(proxy_steps=7), texts(tmp_path))
    assert (name, results) == ("proxy", {})
    assert "trained for 7 steps" in told
    assert asked == [(7, texts(tmp_path).max_texts)]
    assert list(proxy_part(tmp_path, comparison, WITHOUT_MODELS, texts(tmp_path))) == []
