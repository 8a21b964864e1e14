"""Sides are chosen row by row: copies stay together, and no row moves another."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.data.record import Record
from utils.data.splits import Shares, hold_out, split_rows

SHARES = Shares(0.2, 0.1)


def rows(count: int) -> list[dict[str, object]]:
    return [{"instruction": f"do {i}", "answer": str(i)} for i in range(count)]


def test_every_row_is_on_one_side_and_the_shares_are_met() -> None:
    sides = split_rows(rows(4000), SHARES, 0)
    assert sorted(int(str(row["answer"])) for side in sides.values() for row in side) == list(range(4000))
    assert [len(sides[name]) / 4000 for name in ("train", "val", "test")] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_the_split_depends_on_the_seed_and_is_repeatable() -> None:
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
def test_removing_a_row_moves_no_other(taken: int) -> None:
    whole, out = rows(100), rows(100)[taken]
    without = split_rows([row for row in whole if row is not whole[taken]], SHARES, 0)
    expected = {name: [row for row in side if row != out] for name, side in split_rows(whole, SHARES, 0).items()}
    assert without == expected


@pytest.mark.parametrize(("val", "test"), [(0.0, 0.1), (0.1, 0.0), (1.0, 0.1), (0.5, 0.5), (float("nan"), 0.1)])
def test_shares_that_leave_a_side_empty_are_refused(val: float, test: float) -> None:
    with pytest.raises(InvalidArgument, match="_share"):
        Shares(val, test)


def some_records(count: int) -> list[Record]:
    return [Record(f"text {n}", ((0, 1),), None if n % 3 else f"author {n % 30}") for n in range(count)]


def test_what_is_held_out_is_a_share_and_whole_authors() -> None:
    records = some_records(3000)
    train, held_out = hold_out(records, 0.2, seed=1)
    assert len(train) + len(held_out) == 3000
    alone = [record for record in held_out if record.author is None]
    assert 0.15 < len(alone) / 2000 < 0.25
    assert not {record.author for record in held_out if record.author} & {record.author for record in train}
    assert hold_out(records, 0.2, seed=2)[1] != held_out
    assert hold_out(records, 0.0, seed=1) == (records, [])


def test_one_authors_rows_do_not_change_the_side_of_others() -> None:
    records = some_records(300)
    without = [record for record in records if record.author != "author 3"]
    for whole, rest in zip(hold_out(records, 0.3, seed=1), hold_out(without, 0.3, seed=1), strict=True):
        assert [record for record in whole if record.author != "author 3"] == rest
