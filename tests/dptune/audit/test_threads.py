"""Ranks in threads gather, broadcast and fail as processes do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dptune.audit.threads import run_in_threads
from dptune.ranks import ALONE, Ranks


def test_one_rank_is_alone() -> None:
    assert run_in_threads(1, lambda ranks: ranks) == [ALONE]


def test_ranks_gather_in_order_and_hear_the_main_one() -> None:
    heard: list[list[Tensor]] = []

    def work(ranks: Ranks) -> tuple[list[float], int]:
        assert ranks.gather is not None
        together = [ranks.gather(torch.tensor([float(10 * ranks.rank + turn)])) for turn in range(3)]
        return torch.cat(together).tolist(), ranks.from_main(lambda: 7 + ranks.rank)

    found = run_in_threads(3, work, heard.append)
    assert found == [([0, 10, 20, 1, 11, 21, 2, 12, 22], 7)] * 3
    assert [torch.cat(shares).tolist() for shares in heard] == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]


def test_the_error_of_one_rank_ends_all_and_is_raised() -> None:
    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ValueError("only here")
        ranks.from_main(lambda: None)

    with pytest.raises(ValueError, match="only here"):
        run_in_threads(2, work)
