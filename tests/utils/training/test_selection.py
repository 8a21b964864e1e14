"""Whether held-out rows decide anything."""

from __future__ import annotations

import pytest

from utils.training.selection import NOTHING, HeldOutSelection


@pytest.mark.parametrize(
    ("selection", "decides"),
    [(NOTHING, False), (HeldOutSelection(patience=1), True), (HeldOutSelection(keep_best=True), True)],
)
def test_either_setting_decides_something(selection: HeldOutSelection, decides: bool) -> None:
    assert selection.decides is decides
