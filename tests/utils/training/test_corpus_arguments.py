"""Flags of a Trainer on a corpus: what belongs to authors is asked for with authors, and refused without."""

from __future__ import annotations

from typing import Any

import pytest

from dptune._validate import InvalidArgument
from dptune.units.unit import PrivacyUnit
from utils.training.corpus_arguments import CorpusArguments, CorpusModelArguments


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"train_file": None}, "--train_file=None"),
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
    authors = CorpusArguments("texts.jsonl", author_column="user", privacy_level="author", examples_per_author=3)
    assert authors.unit == PrivacyUnit("user", examples=3)


@pytest.mark.parametrize(("name", "value"), [("sequence_len", 1), ("lora_dim", -1)])
def test_counts_are_counts(name: str, value: int) -> None:
    with pytest.raises(InvalidArgument, match=f"^--{name}={value}: give a whole number"):
        CorpusModelArguments("gpt2", **{name: value})  # type: ignore[arg-type]
