"""The table of cut draws: its exact sums are those of all draws counted, and it runs."""

from __future__ import annotations

import pytest

from benchmarks import truncation
from tests.dptune.accounting.cut_steps import sums_of_draws


@pytest.mark.parametrize(("others", "q", "most"), [(5, 0.9, 4), (4, 0.5, 1), (3, 0.3, 5), (4, 1.0, 4)])
def test_sums_of_gradients_that_are_alike_are_those_of_all_draws(others: int, q: float, most: int) -> None:
    found = truncation.sums_where_others_are_alike(others, q, most)
    for one, gradients in zip(found, ([-1] * others + [1], [-1] * others), strict=True):
        counted = sums_of_draws(gradients, q, most)
        for place in {*one, *counted}:
            assert one.get(place, 0.0) == pytest.approx(counted.get(place, 0.0), abs=1e-12)


def test_no_exact_delta_is_above_what_is_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "_TRIALS", 300)
    lines = list(truncation.small_cases())
    assert all(float(counted) <= float(accounted) for _, counted, _, accounted, _ in lines)
    assert any("too small" in plain for *_, plain in lines)
