"""Sides are chosen row by row: copies stay together, and no row moves another."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.data.splits import Shares, split_rows

SHARES = Shares(0.2, 0.1)


def rows(count: int) -> list[dict[str, object]]:
    return [{"instruction": f"do {i}", "answer": str(i)} for i in range(count)]


def test_every_row_is_on_one_side_and_the_shares_are_met() -> None:
    sides = split_rows(rows(4000), SHARES, 0)
    assert sorted(int(str(row["answer"])) for side in sides.values() for row in side) == list(range(4000))
    assert [len(sides[name]) / 4000 for name in ("train", "val", "test")] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_another_seed_splits_otherwise_and_the_same_one_alike() -> None:
    first, again, other = (split_rows(rows(200), SHARES, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_copies_of_an_instruction_stay_together() -> None:
    copies = [{"instruction": f"{pad}do  {i}{pad}", "answer": pad} for i in range(300) for pad in ("", " ", "\n")]
    sides = split_rows(copies, SHARES, 0)
    assert all(len(side) % 3 == 0 for side in sides.values())
    where = {name: {str(row["instruction"]).split()[1] for row in side} for name, side in sides.items()}
    assert not where["train"] & where["val"] | where["train"] & where["test"] | where["val"] & where["test"]
    assert all(where.values())


def test_a_user_stays_together() -> None:
    named = [{**row, "user": f"user {number % 50}"} for number, row in enumerate(rows(500))]
    sides = split_rows(named, SHARES, 0)
    users = [{row["user"] for row in side} for side in sides.values()]
    assert sum(map(len, users)) == 50
    assert all(users)


@pytest.mark.parametrize("taken", [0, 7, 99])
def test_taking_a_row_out_moves_no_other(taken: int) -> None:
    whole, out = rows(100), rows(100)[taken]
    without = split_rows([row for row in whole if row is not whole[taken]], SHARES, 0)
    expected = {name: [row for row in side if row != out] for name, side in split_rows(whole, SHARES, 0).items()}
    assert without == expected


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.1), (0.1, 0.0), (1.0, 0.1), (0.5, 0.5), (float("nan"), 0.1)])
def test_shares_that_leave_a_side_empty_are_refused(val: float, test: float) -> None:
    with pytest.raises(InvalidArgument, match="_share"):
        Shares(val, test)
