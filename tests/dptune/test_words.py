"""A noun follows its number."""

from __future__ import annotations

import pytest

from dptune._words import counted


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 lost rows"), (1, "1 lost row"), (2, "2 lost rows"), (12345, "12,345 lost rows")]
)
def test_one_is_singular_and_all_else_plural(count: int, told: str) -> None:
    assert counted(count, "lost row") == told
