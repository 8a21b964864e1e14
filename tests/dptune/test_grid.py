"""The grid of released values depends on the noise alone, and is fine enough to add almost no error."""

from __future__ import annotations

import math

import pytest

from dptune._validate import InvalidArgument
from dptune.grid import grid_of


@pytest.mark.parametrize("std", [1e-30, 0.3, 1.0, 1.0000001, 2.0, 1e6])
def test_a_power_of_two_just_below_a_thousandth_of_the_noise(std: float) -> None:
    grid = grid_of(std)
    assert math.frexp(grid)[0] == 0.5
    assert 2.0**-11 < grid / std <= 2.0**-10
    assert grid**2 / 12 < std**2 / 1e7, "the variance that rounding adds"


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_noise_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(InvalidArgument, match="std="):
        grid_of(std)
