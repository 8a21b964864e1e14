"""Rows and authors are counted without a tokenizer as the loader counts them with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dptune._validate import InvalidArgument
from dptune.units.unit import EXAMPLE_LEVEL, PrivacyUnit
from tests.tiny import tiny_tokenizer
from tests.utils.data.test_sources import FLAG, write
from utils.data.count_rows import count_sampled
from utils.data.forms import AS_USUAL, NamedColumns
from utils.data.load import load_training_data
from utils.data.sources import AbstractRows, FileRows
from utils.training.plan import num_sampled

AUTHORS = ["ann", "bob", None, "ann", "ann", "", "bob", "cy", None, "ann"]
ROWS = [{"instruction": f"Say {n}.", "answer": "yes", "who": who} for n, who in enumerate(AUTHORS)]


def count(path: Path, unit: PrivacyUnit = PrivacyUnit(), named: NamedColumns = AS_USUAL, **given: Any) -> int:  # noqa: B008 frozen
    settings = {"prompt_style": "plain", "users_flag": None} | given
    return count_sampled(FileRows([path], FLAG), unit, named=named, **settings)


@pytest.mark.parametrize(
    "unit", [PrivacyUnit(), PrivacyUnit("who", examples=2), PrivacyUnit("who", EXAMPLE_LEVEL, examples=2)]
)
def test_the_count_is_that_of_the_loaded_data(unit: PrivacyUnit, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *ROWS)
    loaded, _ = load_training_data(
        dataset_name=None,
        train_file=[str(path)],
        validation_file=None,
        prompt_style="plain",
        tokenizer=tiny_tokenizer(),
        block_size=32,
        unit=unit,
    )
    assert count(path, unit) == num_sampled(unit, loaded)


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([{"answer": "yes"}], {}, "--train_file="),
        ([ROWS[0], {"answer": "yes"}], {}, "row 2.*instruction"),
        ([ROWS[0] | {"context": "long"}], {}, "context would be left out"),
        ([{"instruction": "a", "answer": "b", "email": "c"}], {"users_flag": "--privacy_unit"}, "names users in email"),
        ([{"question": "a"}], {"named": NamedColumns(text="story")}, "--text_column='story'"),
    ],
)
def test_rows_that_a_run_refuses_are_refused(
    rows: list[dict[str, object]], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        count(write(tmp_path / "rows.jsonl", *rows), **given)


def test_abstracts_need_no_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"abstract": json.dumps(number)} for number in range(3)]
    monkeypatch.setattr(AbstractRows, "_rows", lambda _: iter(texts))
    source = AbstractRows(tmp_path, days=None)  # type: ignore[arg-type]
    assert count_sampled(source, PrivacyUnit(), prompt_style="plain", named=AS_USUAL, users_flag=None) == 3
