"""Which steps count in an average, and how much."""

from __future__ import annotations

import math

import pytest

from dptune import InvalidArgument
from dptune.averaging import NO_AVERAGE, Averaging, describe_averaging


def shares(averaging: Averaging, count: int) -> list[float]:
    """The part of each of so many steps in their average."""
    found: list[float] = []
    for before in range(count):
        weight = averaging.weight(before)
        found = [share * (1 - weight) for share in found] + [weight]
    return found


@pytest.mark.parametrize("averaging", [Averaging(ema=0.9), Averaging(ema=0.5), Averaging(average_last=0.3)])
@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_the_steps_share_the_average_among_them_and_the_start_has_no_part(averaging: Averaging, count: int) -> None:
    found = shares(averaging, count)
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)
    assert min(found) >= 0


def test_the_mean_counts_all_its_steps_alike() -> None:
    assert shares(Averaging(average_last=0.3), 40) == pytest.approx([1 / 40] * 40)


def test_the_exponential_average_decays_by_its_decay_once_it_has_seen_enough_steps() -> None:
    """(1 + n) / (10 + n) is at least 0.9 from n = 80 on; before, later steps count more than with that decay."""
    found = shares(Averaging(ema=0.9), 200)
    assert found[-50:] == pytest.approx([0.1 * 0.9**age for age in reversed(range(50))])
    early = shares(Averaging(ema=0.9), 20)
    assert early[-1] == pytest.approx(1 - 20 / 29)
    assert sum(early[:10]) < 0.01, "a short run forgets its beginning"


@pytest.mark.parametrize(
    ("averaging", "steps", "first"),
    [
        (Averaging(ema=0.9), 10, 1),
        (NO_AVERAGE, 10, 11),
        (Averaging(average_last=1.0), 10, 1),
        (Averaging(average_last=0.5), 10, 6),
        (Averaging(average_last=0.1), 30, 28),
        (Averaging(average_last=0.11), 30, 27),
        (Averaging(average_last=1e-6), 30, 30),
    ],
)
def test_a_share_of_the_planned_steps_counts_at_least_one(averaging: Averaging, steps: int, first: int) -> None:
    assert averaging.first(steps) == first


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ema": 1.0}, "^ema=1.0: give a decay above 0 and below 1"),
        ({"ema": 0.0}, "^ema=0.0: "),
        ({"ema": math.nan}, "^ema=nan: "),
        ({"average_last": 0.0}, "^average_last=0.0: give a share of all steps"),
        ({"average_last": 1.5}, "^average_last=1.5: "),
        ({"average_last": math.nan}, "^average_last=nan: "),
        (
            {"ema": 0.9, "average_last": 0.5},
            "^average_last=0.5: ema 0.9 already asks for .*; give only one of the two$",
        ),
    ],
)
def test_mistakes_are_refused(given: dict[str, float], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        Averaging(**given)


def test_it_says_what_is_released() -> None:
    (line,) = describe_averaging(Averaging(average_last=0.25), 40)
    assert line == "released weights       mean of the weights after steps 31 to 40"
    assert Averaging(average_last=0.25).in_words(40, 35) == "mean of the weights after steps 31 to 35"
    assert Averaging(average_last=0.25).in_words(40, 31) is None, "that step's weights themselves"
    assert Averaging(average_last=0.25).in_words(40, 30) is None
    assert "with decay 0.95" in describe_averaging(Averaging(ema=0.95), 40)[0]
    assert describe_averaging(NO_AVERAGE, 40) == []


def test_a_resumed_run_must_share_it() -> None:
    assert Averaging(ema=0.9).identity == {"ema": 0.9}
    assert Averaging(average_last=0.5).identity == {"average_last": 0.5}
    assert NO_AVERAGE.identity == {}
    assert [one.is_on for one in (Averaging(ema=0.9), Averaging(average_last=0.5), NO_AVERAGE)] == [True, True, False]
