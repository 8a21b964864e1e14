"""Authors of rows, the rows that are kept per author, and draws of authors."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from dptune import InvalidArgument
from dptune.units.unit import EXAMPLE_LEVEL, PrivacyUnit, bound_authors, group_by_author
from tests.tiny import tiny_tokenizer
from utils.data.load import load_training_data
from utils.data.tokenization import TokenizedDataset

TOKENIZER = tiny_tokenizer()


def test_rows_with_one_name_belong_together_and_rows_without_one_to_nobody_else() -> None:
    authors = group_by_author(["b", "a", None, "b", None, "a", "b", "0"])
    assert [rows.tolist() for rows in authors.rows()] == [[0, 3, 6], [1, 5], [2], [4], [7]]
    assert (len(authors), authors.largest, authors.num_left_out) == (5, 3, 0)


def test_one_person_written_in_many_ways_is_one_author() -> None:
    written = [7, "7.0", "8", 7.0, "007", 8.0, None, "7e0"]
    assert group_by_author(written).of_row.tolist() == [0, 0, 1, 0, 0, 1, 2, 0]
    kept, authors = bound_authors(range(8), written, 2, 0)
    assert (len(kept), len(authors), authors.largest) == (5, 3, 5)


NAMES = ["a"] * 6 + ["b"] * 2 + [None] * 5 + ["c"] * 4


@pytest.mark.parametrize("most", [1, 3, 6, 9])
def test_each_author_keeps_as_many_rows_as_the_bound_allows(most: int) -> None:
    rows = list(range(len(NAMES)))
    kept, authors = bound_authors(rows, NAMES, most, 0)
    assert kept == sorted(kept)
    assert Counter(NAMES[row] for row in kept) == {"a": min(6, most), "b": min(2, most), None: 5, "c": min(4, most)}
    assert [kept[row] for row in authors.rows()[0]] == [row for row in kept if NAMES[row] == "a"]
    assert (len(authors), authors.largest, authors.num_left_out) == (8, 6, len(rows) - len(kept))


def test_what_one_author_keeps_depends_on_nobody_else() -> None:
    """Otherwise removing one author would change the rows of all others, which voids the bound."""
    for seed in range(20):
        rows = [f"{name}{number}" for number, name in enumerate(NAMES)]
        whole, _ = bound_authors(rows, NAMES, 2, seed)
        for gone in ("a", "b", "c", None):
            stay = [number for number, name in enumerate(NAMES) if name != gone]
            kept, _ = bound_authors([rows[n] for n in stay], [NAMES[n] for n in stay], 2, seed)
            assert kept == [row for row in whole if NAMES[rows.index(row)] != gone]


def test_all_rows_of_an_author_are_kept_equally_often_and_the_seed_decides() -> None:
    counts: Counter[tuple[int, ...]] = Counter(
        tuple(bound_authors(range(5), ["a"] * 5, 2, seed)[0]) for seed in range(4000)
    )
    assert len(counts) == 10
    assert chisquare(list(counts.values())).pvalue > 1e-4
    assert bound_authors(range(5), ["a"] * 5, 2, 3)[0] == bound_authors(range(5), ["a"] * 5, 2, 3)[0]


def load(path: Path, rows: list[dict[str, Any]], **how: Any) -> TokenizedDataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset_name": None, "train_file": str(path), "validation_file": None, "prompt_style": "plain"}
    return load_training_data(**settings | {"tokenizer": TOKENIZER, "block_size": 32} | how)[0]


ROWS = [
    {"instruction": f"Say {n}.", "answer": "yes", "user": user} for n, user in enumerate(["a", "b", None, "a", " a"])
]


def test_loaded_rows_know_their_authors(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert load(path, ROWS).authors is None
    data = load(path, [*ROWS, {"instruction": "", "answer": "no"}], unit=PrivacyUnit("user", examples=2))
    assert data.authors is not None
    assert data.authors.of_row.tolist() == [0, 1, 2, 0, 0, 3], "a row without the column is one without a value"
    other = load(path, [{**ROWS[0], "user": "c"}, *ROWS[1:]], unit=PrivacyUnit("user", examples=2))
    assert load(path, ROWS, unit=PrivacyUnit("user", examples=2)).fingerprint() != other.fingerprint()


def test_bounded_authors_are_bounded_in_what_is_trained_on(tmp_path: Path) -> None:
    unit = PrivacyUnit("user", EXAMPLE_LEVEL, examples=2)
    data = load(tmp_path / "rows.jsonl", ROWS, unit=unit)
    assert data.authors is not None
    assert np.bincount(data.authors.of_row).max() == 2
    assert (len(data), data.authors.largest, data.authors.num_left_out) == (4, 3, 1)
    same = load(tmp_path / "rows.jsonl", ROWS, unit=unit)
    assert data.fingerprint() == same.fingerprint(), "the same rows at every launch"
    prints = {load(tmp_path / "rows.jsonl", ROWS, unit=unit, seed=seed).fingerprint() for seed in range(12)}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("rows", "unit", "told"),
    [
        (ROWS, "author", "--privacy_unit='author': no such column in .*, which has instruction, answer, user; name"),
        (
            [{**ROWS[0], "user": ["a", "secret"]}],
            "user",
            r"row 1 \(counted from 1\): user is neither text nor a number",
        ),
    ],
)
def test_a_column_that_names_no_authors_is_refused(tmp_path: Path, rows: Any, unit: str, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told) as caught:
        load(tmp_path / "rows.jsonl", rows, unit=PrivacyUnit(unit, examples=2))
    assert "secret" not in str(caught.value)


def test_a_named_data_set_has_no_authors(tmp_path: Path) -> None:
    how = {"train_file": None, "dataset_name": "pubmed_generation", "unit": PrivacyUnit("user", examples=2)}
    with pytest.raises(
        InvalidArgument, match="--privacy_unit='user': --dataset_name pubmed_generation names no authors"
    ):
        load(tmp_path / "rows.jsonl", ROWS, **how)


def test_views_are_part_of_the_method_and_of_the_identity() -> None:
    told = "; an example's gradient is the mean over 4 views of it"
    for one in (PrivacyUnit(), PrivacyUnit("user", examples=3), PrivacyUnit("user", EXAMPLE_LEVEL, 3)):
        several = replace(one, views=4)
        assert several.how == one.how + told
        assert several.identity == one.identity | {"views": 4}
        assert (several.rows_at_once, several.group_size) == (one.rows_at_once, one.group_size)
