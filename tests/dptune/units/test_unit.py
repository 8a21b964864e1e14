"""Authors of rows, rows kept of authors, and draws of authors."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from dptune import InvalidArgument, Keystream, PoissonSampler
from dptune.units.batches import AuthorDraw, AuthorSampler, parts_of, rows_of
from dptune.units.unit import EXAMPLE_LEVEL, PrivacyUnit, author_name, bound_authors, group_by_author
from tests.tiny import tiny_tokenizer
from utils.data.load import load_training_data
from utils.data.tokenization import TokenizedDataset

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        *(("ann", "ann"), (" ann\n", "ann"), ("Ann", "Ann"), (7, "7"), (7.0, "7"), ("7", "7"), (7.5, "7.5")),
        *(("7.0", "7"), (" 7.00 ", "7"), ("-7.0", "-7"), ("7.50", "7.50"), ("v7.0", "v7.0"), ("7.0.0", "7.0.0")),
        *((np.int64(7), "7"), (np.float64(7), "7"), (math.inf, "inf"), (0, "0"), ("nan", "nan")),
        *((None, None), ("", None), (" \t", None), (math.nan, None), (np.float64("nan"), None)),
    ],
)
def test_what_names_an_author(value: Any, name: str | None) -> None:
    assert author_name(value) == name


@pytest.mark.parametrize("value", [["ann"], {"name": "ann"}, True, b"ann"])
def test_what_names_nobody(value: Any) -> None:
    with pytest.raises(TypeError):
        author_name(value)


def test_rows_with_one_name_belong_together_and_rows_without_one_to_nobody_else() -> None:
    authors = group_by_author(["b", "a", None, "b", None, "a", "b", "0"])
    assert [rows.tolist() for rows in authors.rows()] == [[0, 3, 6], [1, 5], [2], [4], [7]]
    assert (len(authors), authors.largest, authors.num_left_out) == (5, 3, 0)


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
    """Else taking one author out would change the rows of all others, and the bound would be void."""
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


def sampler(sizes: list[int], q: float, most: int, seed: int = 0) -> AuthorSampler:
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return AuthorSampler(PoissonSampler(len(sizes), q, Keystream.for_tests(seed)), rows, most, mean=True)


def test_authors_are_drawn_independently_and_their_rows_uniformly() -> None:
    drawn = sampler([1, 2, 4, 6], 0.3, 3)
    authors: Counter[int] = Counter()
    subsets: dict[int, Counter[tuple[int, ...]]] = {2: Counter(), 3: Counter()}
    pairs, rounds = 0, 6000
    for _ in range(rounds):
        draw = drawn.draw()
        found = [int(np.searchsorted([1, 3, 7], rows[0], side="right")) for rows in draw.rows]
        assert found == sorted(set(found))
        authors.update(found)
        pairs += 2 in found and 3 in found
        for author, rows in zip(found, draw.rows, strict=True):
            assert len(set(rows.tolist())) == len(rows) == min([1, 2, 4, 6][author], 3)
            if author in subsets:
                subsets[author][tuple(rows.tolist())] += 1
    for author in range(4):
        assert abs(authors[author] / rounds - 0.3) < 5 * math.sqrt(0.21 / rounds)
    assert abs(pairs / rounds - 0.09) < 5 * math.sqrt(0.09 * 0.91 / rounds)
    assert [len(found) for found in subsets.values()] == [4, 20]
    assert all(chisquare(list(found.values())).pvalue > 1e-4 for found in subsets.values())


def test_a_draw_goes_on_where_the_stream_stands() -> None:
    one, other = sampler([3, 5, 9], 0.6, 2), sampler([3, 5, 9], 0.6, 2)
    for _ in range(3):
        other.draw()
    draws = [one.draw() for _ in range(4)]
    assert rows_of(draws[3]).tolist() == rows_of(other.draw()).tolist()
    assert len({tuple(rows_of(draw).tolist()) for draw in draws}) > 1


def data_of(lengths: list[int]) -> TokenizedDataset:
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    starts = np.cumsum([0, *lengths])
    is_answer = ~np.isin(np.arange(len(ids)), starts)
    return TokenizedDataset(ids, is_answer, starts, num_cut=0)


@pytest.mark.parametrize("mean", [True, False])
def test_a_batch_of_authors_is_filled_up_with_rows_that_teach_nothing(mean: bool) -> None:
    data = data_of([2, 3, 1, 4, 2, 2])
    (part,) = parts_of(AuthorDraw([np.array([0, 2, 3]), np.array([1, 4, 5])], mean), data)
    assert (part.rows_per_unit, part.items.tolist(), part.lengths.tolist()) == (3, [0, 1], [12, 9])
    (part,) = parts_of(AuthorDraw([np.array([5]), np.array([1]), np.array([3])], mean), data)
    assert (part.rows_per_unit, part.lengths.tolist()) == (1, [2, 3, 4])
    parts = parts_of(AuthorDraw([np.array([0, 1, 2]), np.array([3, 4, 5, 1]), np.array([5])], mean), data)
    assert [(part.rows_per_unit, part.items.tolist()) for part in parts] == [(1, [2]), (4, [0, 1])]
    batch = parts[1].batch(np.array([0, 1]), 99)
    assert batch.inputs["input_ids"].shape == (8, 4)
    assert batch.is_row is not None
    assert batch.weights is not None
    assert batch.is_row.tolist() == [True] * 3 + [False] + [True] * 4
    assert torch.equal(batch.inputs["input_ids"][:3, :3], data.batch([0, 1, 2], 99)["input_ids"])
    assert batch.inputs["labels"][:, 0].tolist() == [-100] * 8
    assert batch.inputs["labels"][3].tolist() == [-100] * 4
    assert batch.weights.tolist() == pytest.approx([1 / 3] * 4 + [1 / 4] * 4 if mean else [1] * 8)


def test_no_author_is_filled_up_beyond_twice_their_rows() -> None:
    data, rng = data_of([3] * 200), np.random.default_rng(0)
    draw = AuthorDraw(np.split(np.arange(200), np.cumsum(rng.integers(1, 12, 25))), mean=True)
    parts = parts_of(draw, data)
    assert sorted(np.concatenate([part.items for part in parts]).tolist()) == list(range(len(draw)))
    for part in parts:
        for item in part.items:
            assert part.rows_per_unit / 2 < len(draw.rows[item]) <= part.rows_per_unit


def test_nobody_drawn_is_no_part_at_all() -> None:
    assert parts_of(AuthorDraw([], mean=True), data_of([2])) == []
    assert rows_of(AuthorDraw([], mean=True)).tolist() == []


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
