"""The default delta is at most a tenth of 1/n, a power of ten, and the largest such."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptune._validate import InvalidArgument, require_delta
from dptune.accounting.delta import default_delta, delta_in_words


@given(st.integers(1, 10**15))
def test_it_is_the_largest_power_of_ten_that_is_small_enough(num_examples: int) -> None:
    exponent = int(f"{default_delta(num_examples):e}".partition("e")[2])
    power, most = Fraction(10) ** exponent, Fraction(1, 10 * num_examples)
    assert default_delta(num_examples) == float(power)
    assert power <= most < 10 * power
    require_delta(default_delta(num_examples), num_examples)


@pytest.mark.parametrize(("number", "delta"), [(1, 0.1), (10, 0.01), (11, 1e-3), (67_349, 1e-6), (1_000_000, 1e-7)])
def test_round_numbers(number: int, delta: float) -> None:
    assert default_delta(number) == delta


def test_the_reason_names_what_is_sampled() -> None:
    assert delta_in_words(874, "authors") == (
        "delta 0.0001: a tenth of 1 / 874 authors, rounded down to a power of ten"
    )


def test_no_examples_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^num_examples=0: "):
        default_delta(0)
