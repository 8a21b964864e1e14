"""The best evaluation so far: when training ends, whose weights are released, and what a checkpoint keeps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.training.best import BEST_NAME, BestWeights, resumed_best
from utils.training.selection import NOTHING, HeldOutSelection


def seen(selection: HeldOutSelection, losses: list[float | None]) -> tuple[BestWeights, nn.Parameter]:
    """After an evaluation per step; the parameter is the number of its step."""
    best, parameter = BestWeights(selection), nn.Parameter(torch.zeros(2))
    for step, loss in enumerate(losses, start=1):
        parameter.data.fill_(step)
        best.see(step, loss, [parameter])
    return best, parameter


@pytest.mark.parametrize(
    ("losses", "over"),
    [([3.0, 2.0, 2.5], False), ([3.0, 2.0, 2.5, 2.0], True), ([3.0, math.nan, math.inf], True), ([3, 4, 2, 3], False)],
)
def test_training_ends_after_evaluations_without_a_lower_loss(losses: list[float | None], over: bool) -> None:
    assert seen(HeldOutSelection(patience=2), losses)[0].is_over is over
    assert not seen(HeldOutSelection(keep_best=True), losses)[0].is_over


def test_the_weights_with_the_lowest_loss_come_back() -> None:
    best, parameter = seen(HeldOutSelection(keep_best=True), [3.0, 2.0, 2.5])
    assert best.put_back([parameter]) == 2
    assert parameter.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("selection", [NOTHING, HeldOutSelection(patience=2)])
def test_the_last_weights_stay_if_the_best_are_not_asked_for(selection: HeldOutSelection) -> None:
    best, parameter = seen(selection, [3.0, 2.0, 2.5])
    assert best.put_back([parameter]) is None
    assert parameter.tolist() == [3.0, 3.0]


def test_a_checkpoint_keeps_it_all(tmp_path: Path) -> None:
    selection = HeldOutSelection(patience=3, keep_best=True)
    best, parameter = seen(selection, [3.0, 2.0, 2.5])
    (tmp_path / BEST_NAME).write_bytes(best.files()[BEST_NAME])
    found = resumed_best(selection, tmp_path)
    assert (found.step, found.loss, found.waited) == (2, 2.0, 1)
    assert found.put_back([parameter]) == 2


def test_new_flags_start_anew(tmp_path: Path) -> None:
    best, _ = seen(HeldOutSelection(patience=3), [3.0, 2.0])
    (tmp_path / BEST_NAME).write_bytes(best.files()[BEST_NAME])
    for found in (
        resumed_best(HeldOutSelection(keep_best=True), tmp_path),  # the checkpoint has no weights
        resumed_best(HeldOutSelection(patience=1), tmp_path / "nothing"),
        resumed_best(HeldOutSelection(patience=1), None),
        resumed_best(NOTHING, tmp_path),
    ):
        assert (found.step, found.waited) == (0, 0)
    assert seen(NOTHING, [3.0])[0].files() == {}
