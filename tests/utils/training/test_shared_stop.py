"""All ranks learn of a request at the same micro-batch, one later than it was made, and wait for no one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_processes
from utils.training.shared_stop import SharedStop

_WAIT = 10.0  # seconds until a rank gives up


def test_a_single_process_looks_at_its_own_request_at_once() -> None:
    stop = SharedStop(1)
    assert [stop.before_micro_batch(asked) for asked in (False, True)] == [False, True]
    assert [stop.after_draw(asked) for asked in (False, True)] == [False, True]


def _draw(stop: SharedStop, asked: list[bool], at_end: bool) -> list[bool]:
    """What a rank sees before each micro-batch and at the end; a draw that stops is not continued."""
    seen: list[bool] = []
    for one in asked:
        seen.append(stop.before_micro_batch(one))
        if seen[-1]:
            return seen
    return [*seen, stop.after_draw(at_end)]


def _waits_for_nobody(stop: SharedStop, rank: int, folder: Path) -> bool:
    """Rank 1 asks only after rank 0 has gone on; so a rank that waits for the other never returns."""
    called = folder / "called"
    if rank == 0:
        found = stop.before_micro_batch(False)
        called.touch()
        return found
    end = time.monotonic() + _WAIT
    while not called.exists():
        assert time.monotonic() < end, "rank 0 waits for this one"
        time.sleep(0.01)
    return stop.before_micro_batch(True)


def _two_ranks(rank: int, _gather: object, folder: Path) -> dict[str, Any]:
    stop, mine = SharedStop(2), rank == 1
    return {
        "nobody": _draw(stop, [False] * 3, False),
        "second": _draw(stop, [False, mine, mine, mine], mine),
        "last": _draw(stop, [False, False, mine], mine),
        "after the last": _draw(stop, [False, False], mine),
        "before all": _draw(stop, [mine, mine, mine], mine),
        "none left": _draw(stop, [False], False),
        "no micro-batch": _draw(stop, [], mine),
        "at once": [_waits_for_nobody(stop, rank, folder), stop.before_micro_batch(False)],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(2, _two_ranks, tmp_path_factory.mktemp("stop"))


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        ("nobody", [False] * 4),
        ("second", [False, False, True]),
        ("last", [False, False, False, True]),
        ("after the last", [False, False, True]),
        ("before all", [False, True]),
        ("none left", [False, False]),
        ("no micro-batch", [True]),
        ("at once", [False, True]),
    ],
)
def test_all_ranks_see_it_one_micro_batch_later(case: str, seen: list[bool], ranks: list[dict[str, Any]]) -> None:
    assert [rank[case] for rank in ranks] == [seen] * 2
