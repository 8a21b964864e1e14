"""A micro-batch's losses are one per example, in whole units."""

from __future__ import annotations

import pytest
import torch

from dptune import InvalidArgument
from dptune.micro_batch import require_losses


@pytest.mark.parametrize("shape", [(), (4, 1), (2, 2)])
def test_only_one_loss_per_example_is_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match=r"losses\.shape=.* one loss per example"):
        require_losses(torch.ones(shape), 1)


@pytest.mark.parametrize(("rows", "rows_per_unit", "whole"), [(6, 3, True), (0, 3, True), (7, 3, False), (2, 3, False)])
def test_only_whole_units_are_taken(rows: int, rows_per_unit: int, whole: bool) -> None:
    if whole:
        require_losses(torch.ones(rows), rows_per_unit)
        return
    with pytest.raises(InvalidArgument, match=f"rows_per_unit={rows_per_unit}: must divide the {rows} rows"):
        require_losses(torch.ones(rows), rows_per_unit)
