"""Draws of authors, and the batches that are made of them."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from dptune import Keystream, PoissonSampler
from dptune.shapes import Shape, Shapes, deal_in_shapes
from dptune.units.batches import AuthorDraw, AuthorSampler, Batch, Part, choose_rows, parts_of, rows_of
from dptune.units.unit import Authors
from utils.data.tokenization import TokenizedDataset


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
    (part,) = parts_of(AuthorDraw([np.array([0, 2, 3]), np.array([1, 4, 5])], mean, most=3), data)
    assert (part.rows_per_unit, part.items.tolist(), part.tokens.tolist()) == (3, [0, 1], [4, 3])
    (part,) = parts_of(AuthorDraw([np.array([5]), np.array([1]), np.array([3])], mean, most=9), data)
    assert (part.rows_per_unit, part.tokens.tolist()) == (1, [2, 3, 4])
    draw = AuthorDraw([np.array([0, 1, 2]), np.array([3, 4, 5, 1]), np.array([5])], mean, most=9)
    parts = parts_of(draw, data)
    assert [(part.rows_per_unit, part.items.tolist()) for part in parts] == [(1, [2]), (4, [0, 1])]
    batch = parts[1].batch(np.array([0, 1]), Shape(3, 6), 99)
    assert batch.inputs["input_ids"].shape == (12, 6)
    assert batch.weights is not None
    assert batch.items == 2
    assert batch.rows.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(batch.inputs["input_ids"][:3, :3], data.batch([0, 1, 2], 99)["input_ids"])
    assert batch.inputs["labels"][:, 0].tolist() == [-100] * 12
    assert (batch.inputs["labels"][[3, 8, 9, 10, 11]] == -100).all()
    assert batch.weights[:8].tolist() == pytest.approx([1 / 3] * 4 + [1 / 4] * 4 if mean else [1] * 8)


def test_the_rows_that_an_author_is_filled_up_to_do_not_depend_on_who_else_is_drawn() -> None:
    data, three, five = data_of([2] * 8), np.array([0, 1, 2]), np.array([3, 4, 5, 6, 7])
    for others in ([], [five]):
        parts = parts_of(AuthorDraw([three, *others], mean=True, most=5), data)
        assert [part.rows_per_unit for part in parts if 0 in part.items] == [4]


def test_no_author_is_filled_up_beyond_twice_their_rows() -> None:
    data, rng = data_of([3] * 200), np.random.default_rng(0)
    draw = AuthorDraw(np.split(np.arange(200), np.cumsum(rng.integers(1, 12, 25))), mean=True, most=200)
    parts = parts_of(draw, data)
    assert sorted(np.concatenate([part.items for part in parts]).tolist()) == list(range(len(draw)))
    for part in parts:
        for item in part.items:
            assert part.rows_per_unit / 2 < len(draw.rows[item]) <= part.rows_per_unit


def test_nobody_drawn_is_no_part_at_all() -> None:
    assert parts_of(AuthorDraw([], mean=True, most=1), data_of([2])) == []
    assert rows_of(AuthorDraw([], mean=True, most=1)).tolist() == []


def test_a_draw_of_rows_is_one_part_of_rows_with_their_own_weight() -> None:
    data = data_of([2, 3, 1])
    (part,) = parts_of(np.array([0, 2]), data)
    assert (part.rows_per_unit, part.items.tolist(), part.tokens.tolist()) == (1, [0, 2], [2, 3, 1])
    batch = part.batch(part.items, Shape(2, 3), 99)
    assert (batch.weights, batch.rows.tolist(), batch.items) == (None, [0, 1], 2)
    assert rows_of(part.items).tolist() == [0, 2]


def test_no_items_give_the_dummy_also_where_authors_are_drawn() -> None:
    data = data_of([2, 3])
    part = Part(data, np.array([0]), np.array([4]), rows_per_unit=2, authors=[np.array([0, 1])], mean=True)
    batch = part.batch(np.array([], dtype=np.int64), Shape(1, 4), 99)
    assert (batch.inputs["labels"] == -100).all()
    assert batch.inputs["labels"].shape == (2, 4)
    assert (batch.items, len(batch.rows)) == (0, 0)


def test_a_batch_holds_each_row_in_all_its_views() -> None:
    data = data_of([2, 3, 1])
    (part,) = parts_of(np.array([0, 2]), data, 3)
    assert (part.rows_per_unit, part.items.tolist(), part.tokens.tolist()) == (3, [0, 2], [2, 3, 1])
    batch = part.batch(part.items, Shape(3, 3), 99)
    assert (batch.rows.tolist(), batch.items) == ([0, 1, 2, 3, 4, 5], 2)
    assert batch.weights is not None
    assert batch.weights.tolist() == pytest.approx([1 / 3] * 9)
    for name, value in data.batch([0, 0, 0, 2, 2, 2], 99, 3).items():
        assert torch.equal(batch.inputs[name][:6], value)
    assert (batch.inputs["labels"][6:] == -100).all()


@pytest.mark.parametrize("mean", [True, False])
def test_the_views_of_an_authors_rows_are_averaged_however_rows_are_combined(mean: bool) -> None:
    data = data_of([2, 3, 1, 4])
    (part,) = parts_of(AuthorDraw([np.array([0, 2, 3]), np.array([1, 2])], mean, most=3), data, 2)[1:]
    assert (part.rows_per_unit, part.items.tolist()) == (6, [0])
    batch = part.batch(part.items, Shape(1, 4), 99)
    assert batch.weights is not None
    assert batch.weights.tolist() == pytest.approx([1 / 6 if mean else 1 / 2] * 6)
    assert torch.equal(batch.inputs["input_ids"], data.batch([0, 0, 2, 2, 3, 3], 99, 4)["input_ids"])


def test_rows_beyond_k_are_left_out_and_up_to_k_all_stay() -> None:
    rows = np.array([4, 7, 9, 11])
    assert choose_rows(rows, 4, lambda _: np.zeros(4)).tolist() == rows.tolist()
    assert choose_rows(rows, 2, lambda _: np.array([0.9, 0.1, 0.5, 0.2])).tolist() == [7, 11]


def test_as_many_authors_are_sampled_as_have_rows() -> None:
    with pytest.raises(ValueError, match="2 authors are sampled, but 1 have rows"):
        AuthorSampler(PoissonSampler(2, 0.5, Keystream.for_tests(0)), [np.array([0])], 1, mean=True)


@pytest.mark.parametrize(("kind", "pins"), [("cuda", True), ("xpu", True), ("cpu", False), ("mps", False)])
@pytest.mark.parametrize("weights", [None, torch.ones(2)])
def test_all_of_a_batch_is_pinned_where_copies_are_faster_from_there(
    kind: str, pins: bool, weights: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    plain = Batch({"input_ids": torch.ones(2, 3), "labels": torch.zeros(2, 3)}, torch.arange(2), 2, weights)
    ready = plain.ready_for(torch.device(kind))
    own = [*plain.inputs.values(), plain.rows, *([] if weights is None else [weights])]
    found = [*ready.inputs.values(), ready.rows, *([] if ready.weights is None else [ready.weights])]
    assert len(found) == len(own)
    assert all(torch.equal(one, before + 100 * pins) for one, before in zip(found, own, strict=True))
    assert (ready.items, ready.inputs.keys()) == (plain.items, plain.inputs.keys())


class Counted:
    """An array that counts the elements that are read from it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.base, self.read = array, None, 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, where: Any) -> Any:
        found = self.array[where]
        self.read += np.size(found)
        return found

    def __array__(self, *how: Any, **more: Any) -> np.ndarray:
        self.read += len(self.array)
        return self.array


@pytest.mark.parametrize("authors", [False, True])
def test_a_step_reads_what_was_drawn_and_nothing_else(authors: bool) -> None:
    """Of two million rows with 40 drawn: reading, or making, anything for every row would be seen in both counts."""
    count, width = 2_000_000, 5
    ids: Any = Counted(np.ones(count * width, dtype=np.int32))
    is_answer: Any = Counted(np.ones(count * width, dtype=bool))
    starts: Any = Counted(np.arange(count + 1) * width)
    data, stream = TokenizedDataset(ids, is_answer, starts, num_cut=0), Keystream.for_tests(3)
    shapes = Shapes(8, 64, 40.0)
    who = Authors(np.arange(count) // 2, largest=2)
    draws: Any = PoissonSampler(count, 2e-5, stream)
    if authors:
        draws = AuthorSampler(PoissonSampler(len(who), 4e-5, stream), who.rows(), 1, mean=True)

    def step() -> int:
        draw, items = draws.draw(), 0
        for part in parts_of(draw, data):
            dealt = deal_in_shapes(part.items, part.tokens, shapes, rows_per_item=part.rows_per_unit)
            for shape, (share,) in dealt:
                part.batch(share, shape, 0)
                items += len(share)
        assert data.lengths[rows_of(draw)].sum() == width * items
        return items

    step()  # the first step makes the lengths
    lengths = data.lengths
    ids.read = is_answer.read = starts.read = 0
    tracemalloc.start()
    try:
        items = sum(step() for _ in range(5))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.lengths is lengths
    assert items > 100
    assert ids.read + is_answer.read + starts.read <= items * (4 * width + 4)
    assert peak < count + (1 << 17)  # the sampler's scratch is 1.6 MB, and a byte for each row would be 2 MB more
