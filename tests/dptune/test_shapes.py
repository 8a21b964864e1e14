"""Shapes of micro-batches follow from settings and a row's own length, waste little, and are the same on all ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptune._validate import InvalidArgument
from dptune.shapes import Shape, Shapes, deal_in_shapes


@pytest.mark.parametrize("longest", [1, 2, 7, 8, 9, 64, 100, 512, 4096])
def test_every_row_has_a_width_and_the_last_one_is_the_longest(longest: int) -> None:
    shapes = Shapes(longest, 2048)
    tokens = np.arange(1, longest + 1)
    widths = shapes.width_of(tokens)
    assert (widths >= tokens).all()
    assert widths[-1] == shapes.widths[-1] == longest
    assert (np.diff(shapes.widths) > 0).all()


@pytest.mark.parametrize("longest", [7, 64, 100, 512, 4096])
def test_many_rows_per_step_have_widths_that_are_at_most_a_quarter_wider(longest: int) -> None:
    shapes, tokens = Shapes(longest, 2048, 1e5), np.arange(1, longest + 1)
    assert (shapes.width_of(tokens)[8:] <= np.maximum(np.ceil(tokens[8:] * 5 / 4), tokens[8:] + 1)).all()
    assert len(shapes.widths) <= 4 * min(4, np.log2(longest)) + 16 * max(0, np.log2(longest) - 6)


@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 60),
    budget=st.integers(1, 300),
    drawn=st.sampled_from([1.0, 500.0, 1e6]),
    ranks=st.integers(1, 4),
)
def test_every_item_is_dealt_once_in_the_shape_of_its_own_length(
    seed: int, count: int, budget: int, drawn: float, ranks: int
) -> None:
    chance = np.random.default_rng(seed)
    tokens, shapes = chance.integers(1, 65, 60), Shapes(64, budget, drawn)
    items = np.sort(chance.choice(60, count, replace=False))
    dealt = deal_in_shapes(items, tokens, shapes, ranks=ranks)
    seen = [item for _, shares in dealt for share in shares for item in share]
    assert sorted(seen) == items.tolist()
    for shape, shares in dealt:
        assert len(shares) == ranks
        assert max(map(len, shares)) <= shape.items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert shape.items * shape.width <= max(budget, shape.width)
        for share in shares:
            assert {shapes.shape(int(width)) for width in shapes.width_of(tokens[share])} <= {shape}


def test_rows_of_one_item_and_virtual_tokens_count_in_the_budget() -> None:
    shapes = Shapes(64, 256, 1e6)
    assert shapes.shape(32) == Shape(8, 32)
    assert shapes.shape(32, rows_per_item=4) == Shape(2, 32)
    assert shapes.shape(32, virtual_tokens=32) == Shape(4, 32)
    assert shapes.shape(64, rows_per_item=9) == Shape(1, 64), "an item is never split"


def test_narrow_micro_batches_hold_no_more_than_four_times_the_rows_of_the_widest() -> None:
    assert Shapes(512, 2048, 1e6).shape(8) == Shape(16, 8)


@pytest.mark.parametrize("drawn", [256, 1024, 4096])
@pytest.mark.parametrize("spread", [0.15, 0.3])
def test_padding_stays_small_for_large_logical_batches(drawn: int, spread: float) -> None:
    """Lengths like those of abstracts: log-normal, most within two doublings, cut at 512 tokens."""
    chance = np.random.default_rng(0)
    tokens = np.minimum(np.exp(chance.normal(np.log(250), spread, 20 * drawn)).astype(np.int64), 512)
    shapes = Shapes(512, 2048, drawn)
    shares = []
    for _ in range(10):
        draw = np.flatnonzero(chance.random(len(tokens)) < 1 / 20)
        padded = sum(shape.items * shape.width for shape, _ in deal_in_shapes(draw, tokens, shapes))
        shares.append(1 - tokens[draw].sum() / padded)
    assert np.mean(shares) < 0.05


@pytest.mark.parametrize("longest", [1, 5, 8, 9, 64, 100])
def test_with_masks_only_the_longest_rows_have_no_padding_and_they_have_their_own_micro_batches(longest: int) -> None:
    tokens, shapes = np.tile(np.arange(1, longest + 1), 3), Shapes(longest, 4 * longest, 1e6)
    dealt = deal_in_shapes(np.arange(len(tokens)), tokens, shapes)
    unpadded = [{bool(tokens[item] == shape.width) for item in own} for shape, (own,) in dealt]
    assert all(len(kinds) == 1 for kinds in unpadded)
    full = [tokens[own] for (_, (own,)), kinds in zip(dealt, unpadded, strict=True) if kinds == {True}]
    assert np.concatenate(full).tolist() == [longest] * 3


def test_rows_of_a_micro_batch_can_be_limited() -> None:
    shapes = Shapes(64, 640, 1e6, most_rows=6)
    assert shapes.shape(32) == Shape(6, 32)
    assert shapes.shape(32, rows_per_item=4) == Shape(1, 32)
    with pytest.raises(InvalidArgument, match=r"^most_rows=0"):
        Shapes(64, 640, most_rows=0)


def test_micro_batches_hold_all_views_of_a_row() -> None:
    shapes = Shapes(64, 256, 1e6, views=3)
    assert [shapes.row_counts(rows) for rows in (1, 4, 5)] == [{3}, {3, 6, 12}, {3, 6, 12, 15}]
    assert all(rows % 3 == 0 and tokens <= 256 for rows, tokens in shapes.sizes())
    assert max(rows for rows, _ in shapes.sizes(5)) >= 15
    tokens = np.arange(1, 65)
    assert len(deal_in_shapes(tokens - 1, tokens, shapes, rows_per_item=3)) <= shapes.most_passes(64)
    with pytest.raises(InvalidArgument, match=r"^views=0"):
        Shapes(64, 256, views=0)


def test_with_more_views_of_each_row_fewer_tokens_of_padding_are_made() -> None:
    """Padding costs as many times more, the fixed time of a pass does not."""
    one, four = (Shapes(512, 8192, 30.0, masked=False, overhead=4000.0, views=views) for views in (1, 4))
    assert len(four.widths) > len(one.widths)


def test_a_row_beyond_the_public_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row of 65 tokens, where at most 64"):
        Shapes(64, 100).width_of(np.array([3, 65]))


@pytest.mark.parametrize("changed", [{"longest": 0}, {"token_budget": 0}, {"drawn": 0.0}])
def test_settings_that_cannot_be_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=f"^{next(iter(changed))}="):
        Shapes(**({"longest": 64, "token_budget": 64, "drawn": 1.0} | changed))  # type: ignore[arg-type]


def _time(shapes: Shapes, draws: list[np.ndarray]) -> float:
    """Tokens that take as long as the passes of these draws."""
    dealt = [deal_in_shapes(np.arange(len(tokens)), tokens, shapes) for tokens in draws]
    return sum(shapes.overhead + shape.items * shape.width for micro_batches in dealt for shape, _ in micro_batches)


def _with_widths(shapes: Shapes, per_doubling: float) -> Shapes:
    """The same settings with so many widths per doubling."""
    own = replace(shapes)
    own.__dict__["widths"] = np.array(own._widths(per_doubling))
    return own


@pytest.mark.parametrize("overhead", [30.0, 200.0, 4000.0])
@pytest.mark.parametrize(("drawn", "middle", "spread"), [(24, 90, 0.8), (200, 90, 0.8), (1000, 350, 0.3)])
def test_widths_and_rows_are_near_the_fastest_for_the_overhead_of_a_pass(
    overhead: float, drawn: int, middle: int, spread: float
) -> None:
    """Other numbers of widths are tried on the same draws. A wrong one takes up to 3 times as long."""
    chance = np.random.default_rng(0)
    lengths = np.clip(np.exp(chance.normal(np.log(middle), spread, (8, drawn))), 2, 512).astype(np.int64)
    shapes, draws = Shapes(512, 8192, drawn, masked=False, overhead=overhead), list(lengths)
    others = [_time(_with_widths(shapes, per_doubling), draws) for per_doubling in (0.25, 0.5, 1, 2, 4, 8, 16)]
    assert _time(shapes, draws) <= 1.25 * min(others)


@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 60),
    budget=st.integers(1, 300),
    drawn=st.sampled_from([1.0, 500.0]),
    ranks=st.integers(1, 3),
    rows=st.sampled_from([1, 3]),
    masked=st.booleans(),
)
def test_no_draw_makes_more_micro_batches_than_the_most(
    seed: int, count: int, budget: int, drawn: float, ranks: int, rows: int, masked: bool
) -> None:
    shapes = Shapes(48, budget, drawn, masked=masked)
    tokens = np.random.default_rng(seed).integers(1, 49, count)
    dealt = deal_in_shapes(np.arange(count), tokens, shapes, ranks=ranks, rows_per_item=rows)
    assert len(dealt) <= shapes.most_passes(count, ranks=ranks, rows_per_item=rows)


@pytest.mark.parametrize("masked", [True, False])
def test_some_draw_makes_as_many_micro_batches_as_the_most(masked: bool) -> None:
    """One row of each width, and all others of the width whose micro-batches hold the fewest."""
    shapes = Shapes(64, 256, 500.0, masked=masked)
    fewest = min(shapes.widths, key=lambda width: shapes.shape(int(width)).items)
    lengths = [*(int(width) - masked for width in shapes.widths), *([64] if masked else [])]
    tokens = np.array(lengths + [int(fewest) - masked] * 37)
    dealt = deal_in_shapes(np.arange(len(tokens)), tokens, shapes)
    assert len(dealt) == shapes.most_passes(len(tokens)) < len(tokens)
    assert shapes.most_passes(0) == 0
