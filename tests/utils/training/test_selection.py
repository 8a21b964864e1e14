"""Whether held-out rows decide anything."""

from __future__ import annotations

import pytest

from utils.training.selection import NOTHING, Selection


@pytest.mark.parametrize(
    ("selection", "decides"),
    [(NOTHING, False), (Selection(patience=1), True), (Selection(keep_best=True), True)],
)
def test_either_setting_decides_something(selection: Selection, decides: bool) -> None:
    assert selection.decides is decides
