"""The key of a data set follows from everything that its tokens follow from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dptune.units.unit import EXAMPLE_LEVEL, PrivacyUnit
from tests.tiny import tiny_tokenizer
from utils.data.encoding import Encoder
from utils.data.make_rows import RowSettings, Sources
from utils.data.pubmed import DayRange
from utils.data.sources import AbstractRows, FileRows

TOKENIZER = tiny_tokenizer()
SETTINGS = RowSettings("plain", TOKENIZER, 64, PrivacyUnit(), 0, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_style": "chat"},
        {"block_size": 32},
        {"unit": PrivacyUnit("who", examples=2)},
        {"unit": PrivacyUnit("who", EXAMPLE_LEVEL, examples=2)},
        {"users_flag": "--privacy_unit"},
        {"day": "2026-01-31"},
    ],
)
def test_each_setting_is_in_the_key(change: dict[str, Any], tmp_path: Path) -> None:
    sources: Sources = {"train": FileRows([tmp_path], "--train_file")}
    other = dataclasses.replace(SETTINGS, **change).key(sources)
    assert SETTINGS.key(sources) == SETTINGS.key(sources) != other


def test_the_template_is_in_the_key_and_the_seed_only_where_it_chooses_rows(tmp_path: Path) -> None:
    sources: Sources = {"train": FileRows([tmp_path], "--train_file")}
    changed = tiny_tokenizer()
    changed.chat_template = "{{ messages[0].content }}"
    assert dataclasses.replace(SETTINGS, tokenizer=changed).key(sources) != SETTINGS.key(sources)
    for method, counts in ((EXAMPLE_LEVEL, 2), ("user-level", 1)):
        unit = PrivacyUnit("who", method, examples=2)
        keys = [str(dataclasses.replace(SETTINGS, unit=unit, seed=seed).key(sources)) for seed in (0, 1)]
        assert len(set(keys)) == counts


def test_a_validation_set_without_rows_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"abstract": "We show."}\n')
    (tmp_path / "validation.jsonl").write_text('{"abstract": "late", "date": "2024-01-01"}\n')
    days = DayRange.parse()
    sources: Sources = {
        "train": AbstractRows(tmp_path, days),
        "validation": AbstractRows(tmp_path, days, held_out=True),
    }
    (tmp_path / "made").mkdir()
    assert list(SETTINGS.write(sources, Encoder(TOKENIZER, 64), tmp_path / "made")) == ["train"]
