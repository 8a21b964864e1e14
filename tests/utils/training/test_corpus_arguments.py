"""Flags of a Trainer on a corpus: what belongs to authors is asked for with authors, and refused without."""

from __future__ import annotations

from typing import Any

import pytest

from dptune._validate import InvalidArgument
from dptune.units.unit import PrivacyUnit
from utils.training.corpus_arguments import CorpusArguments, CorpusModelArguments

AUTHORS: dict[str, Any] = {"privacy_level": "author", "author_column": "user", "examples_per_author": 3}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"train_file": None}, "--train_file=None"),
        (AUTHORS | {"ignore_users": True}, "--ignore_users=True: contradicts --privacy_level author"),
        ({"held_out_share": 1.0}, "--held_out_share=1.0"),
        ({"examples_per_author": 2}, "--examples_per_author=2: belongs to"),
        ({"privacy_level": "author", "examples_per_author": 2}, "--author_column=None"),
        ({"privacy_level": "author", "author_column": "user"}, "--examples_per_author=None"),
        ({"privacy_level": "author", "author_column": "user", "examples_per_author": 0}, "--examples_per_author=0"),
    ],
)
def test_a_mistake_is_refused_by_its_flag(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{named}"):
        CorpusArguments(**({"train_file": "texts.jsonl"} | given))


def test_the_unit_is_a_text_or_an_author() -> None:
    assert CorpusArguments("texts.jsonl").unit == PrivacyUnit()
    assert CorpusArguments("texts.jsonl", **AUTHORS).unit == PrivacyUnit("user", examples=3)


def test_a_file_that_names_users_is_taken_for_authors_or_on_demand() -> None:
    assert CorpusArguments("texts.jsonl").users_flag == "--privacy_level author --author_column"
    assert CorpusArguments("texts.jsonl", ignore_users=True).users_flag is None
    assert CorpusArguments("texts.jsonl", **AUTHORS).users_flag is None


@pytest.mark.parametrize(("name", "value"), [("block_size", 1), ("lora_r", -1)])
def test_counts_are_counts(name: str, value: int) -> None:
    with pytest.raises(InvalidArgument, match=f"^--{name}={value}: give a whole number"):
        CorpusModelArguments("gpt2", **{name: value})  # type: ignore[arg-type]
