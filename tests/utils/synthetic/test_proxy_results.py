"""Results of proxy models are kept: a run that was stopped trains only what is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from utils.synthetic import proxy_results
from utils.synthetic.arguments import HELD_OUT, REAL_TRAINING, UNTRAINED
from utils.synthetic.proxy_results import train_proxies
from utils.synthetic.proxy_settings import ProxySettings
from utils.synthetic.texts import Comparison, Sample

SETTINGS = ProxySettings(steps=2, batch_size=2, max_length=8)


def sample(texts: list[str]) -> Sample:
    return Sample(texts, list(range(1, len(texts) + 1)))


def comparison(train: list[str] | None = None) -> Comparison:
    columns = {"a": sample(["one two"] * 5), "b": sample(["two one"] * 5), HELD_OUT: sample(["one"] * 4)}
    return Comparison(columns, sample(["two"] * 4), None if train is None else sample(train))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows each training had."""
    train, seen = proxy_results.train_proxy, []

    def counting(model: Any, windows: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(len(windows.ids))
        train(model, windows, *args, **kwargs)

    monkeypatch.setattr(proxy_results, "train_proxy", counting)
    return seen


def test_each_sample_and_the_training_rows_are_learned_and_nothing_is(tmp_path: Path, trained: list[int]) -> None:
    results = dict(train_proxies(tmp_path, comparison(["one"] * 30), SETTINGS, max_texts=20))
    assert list(results) == ["a", "b", REAL_TRAINING, UNTRAINED]
    assert trained == [5, 5, 20]
    assert all(set(result) == set(results["a"]) and "not_private" not in result for result in results.values())
    assert len({result["nats_per_token"] for result in results.values()}) == 4
    assert list(dict(train_proxies(tmp_path, comparison(), SETTINGS, max_texts=20))) == ["a", "b", UNTRAINED]


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path, trained: list[int]) -> None:
    first = next(train_proxies(tmp_path, comparison(), SETTINGS, max_texts=20))
    assert trained == [5]
    results = dict(train_proxies(tmp_path, comparison(), SETTINGS, max_texts=20))
    assert trained == [5, 5]
    assert results["a"] == first[1]
    again = dict(train_proxies(tmp_path, comparison(), SETTINGS, max_texts=20))
    assert trained == [5, 5]
    assert again == results


def test_what_is_kept_says_that_it_is_not_private(tmp_path: Path) -> None:
    dict(train_proxies(tmp_path, comparison(), SETTINGS, max_texts=20))
    kept = [json.loads(path.read_text()) for path in (tmp_path / "proxy_models").iterdir()]
    assert len(kept) == 3
    assert all(next(iter(content)) == "not_private" for content in kept)


def test_other_settings_are_trained_anew(tmp_path: Path, trained: list[int]) -> None:
    for seed in (0, 1):
        settings = ProxySettings(steps=2, batch_size=2, max_length=8, seed=seed)
        dict(train_proxies(tmp_path, comparison(), settings, max_texts=20))
    assert trained == [5, 5, 5, 5]


def test_a_model_that_diverged_is_kept_as_json_and_is_no_number_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        proxy_results, "summarise_predictions", lambda *_, **__: {"accuracy": math.nan, "nats_per_token": math.inf}
    )
    for _ in range(2):  # as it is trained, and as it is found again
        results = dict(train_proxies(tmp_path, comparison(), SETTINGS, max_texts=20))
        assert all(math.isnan(value) for result in results.values() for value in result.values())
    for path in (tmp_path / "proxy_models").iterdir():
        assert json.loads(path.read_text(), parse_constant=pytest.fail)["accuracy"] is None
