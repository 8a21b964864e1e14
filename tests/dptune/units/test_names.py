"""One person has one name, however a file spells it."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptune.units.names import author_name, author_names

BIG = 2**53 + 1  # no double holds it


@pytest.mark.parametrize(
    "spellings",
    [
        [7, "7", 7.0, "7.0", "7e0", " 7 ", "007", "+7", "7.", "70e-1", "7E+00", "٧"],
        [7, np.int64(7), np.float16(7), Decimal("7.00")],
        [0, "0", "-0", 0.0, -0.0, "0.00", "0e5", "-0.0", Decimal(0)],
        [-12000, "-12e3", "-12000.0", -1.2e4, Decimal("-1.2E+4")],
        [7.5, "7.50", "07.5", "75e-1", np.float32(7.5), Decimal("7.5")],
        [0.1, "0.1", ".1", "1e-1", np.float32("0.1")],
        [BIG, str(BIG), f"0{BIG}", Decimal(BIG), np.int64(BIG)],
        [10**50, "1" + "0" * 50, "1e50"],
        ["Jose\u0301", "José", " José\n"],
        [7, "7\u200b", "\ufeff7", "\u20607", "7\x00", "\u200e7\u200f", "\xa07", "\u202d7.0\u202c", "7\ufe0f"],
        [7, "\uff17", "\uff17\uff0e\uff10", "\uff0b7", "\u0667", "\u0667\u066b\u0660", "\u2077"],
        [-5, "-5", "\u22125", "\uff0d5", "\ufe635", "\u20135", "\u22125.0", "\u2010\uff15", "-5e\u22120"],
        [-5, "\u2212\u200b5"],
        [0.5, "5e\u22121", "5\uff25-1"],
        ["Anna", "Anna\u200b", "\ufeffAnna", "An\u00adna", "Anna\x00", "A\u2060nna", "\uff21nna", "Anna\u3000"],
        ["Ann Lee", "Ann\xa0Lee", "Ann  Lee", "Ann\tLee", "Ann\u2003Lee", "Ann \u200b Lee"],
        ["fin", "\ufb01n"],
        ["\u00c5sa", "A\u030asa", "\u212bsa", "A\u200b\u030asa"],
    ],
)  # fmt: skip
def test_all_spellings_are_one_name(spellings: list[Any]) -> None:
    assert len(set(author_names(spellings))) == 1
    (name,) = set(author_names(spellings))
    assert author_name(name) == name


@pytest.mark.parametrize(
    "people",
    [
        [BIG, BIG - 1, BIG + 1, str(BIG + 2)],  # a double cannot tell some of these apart
        [10**30, 10**30 + 1],
        [7, 70, 7.5, -7, "7.0.0", "v7", "7a", "e7", "7e", ".", "+", "-"],
        ["ann", "Ann", "nan", "inf"],
        ["1000", "1,000", "1 000", "1_000", "1.000,0"],  # a group of three or a fraction: nobody can tell
        ["Anna-Lee", "Anna\u2013Lee", "AnnaLee", "Anna Lee"],
    ],
)
def test_different_people_have_different_names(people: list[Any]) -> None:
    assert len(set(author_names(people))) == len(people)


@pytest.mark.parametrize(
    "value", [None, "", " \t", "\u200b", "\ufeff \x00", "\u3164", math.nan, np.float64("nan"), Decimal("nan")]
)
def test_what_names_nobody(value: Any) -> None:
    assert author_name(value) is None


@pytest.mark.parametrize("value", [["ann"], {"name": "ann"}, True, np.bool_(1), b"ann"])
def test_what_is_no_name(value: Any) -> None:
    with pytest.raises(TypeError):
        author_name(value)


@pytest.mark.parametrize(
    "value",
    [float(2**53), -1e300, f"{2**53}.0", "1.234567890123457e+18", "1E+16", np.float32(2**24), np.float16(2**11)],
)
def test_a_floating_point_number_that_may_have_lost_digits_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="floating-point number of 2"):
        author_name(value)


@pytest.mark.parametrize("value", [2.0**53 - 1, f"{2**53 - 1}.0", np.float32(2**24 - 1), "1234567890123456789e3"])
def test_a_number_with_all_its_digits_is_not(value: Any) -> None:
    assert author_name(value) is not None


@given(st.text())
def test_a_name_is_its_own_name(text: str) -> None:
    try:
        name = author_name(text)
    except ValueError:
        return
    assert name is None or author_name(name) == name


@given(st.text(min_size=1), st.sampled_from("\u200b\ufeff\u2060\u00ad\x00\ufe0f\u034f"), st.integers(0, 9))
def test_invisible_characters_anywhere_change_no_name(text: str, invisible: str, place: int) -> None:
    try:
        name = author_name(text)
    except ValueError:
        return
    assert author_name(text[:place] + invisible + text[place:]) == name


@pytest.mark.parametrize("value", [f"\uff0b{2**53}\uff0e0", f"{2**53}\u066b0", "\u22121E\u200b+16"])
def test_other_spellings_of_a_floating_point_number_are_refused_too(value: str) -> None:
    with pytest.raises(ValueError, match="floating-point number of 2"):
        author_name(value)


@given(st.integers(), st.integers(0, 5), st.integers(0, 5))
def test_whole_numbers_in_any_notation(number: int, zeros: int, places: int) -> None:
    sign, digits = ("-" if number < 0 else ""), str(abs(number))
    expected = author_name(number)
    assert author_name(f"{sign}{'0' * zeros}{digits}") == expected
    assert author_name(f"{sign}{digits}{'0' * places}e-{places}") == expected


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-9e15, max_value=9e15))
def test_a_name_of_a_number_is_that_number(number: float) -> None:
    """Oracle: exact fractions of what Python writes."""
    name = author_name(number)
    assert name is not None
    assert Fraction(name) == Fraction(repr(number))
    assert name == author_name(repr(number)) == author_name(str(Decimal(repr(number))))


@pytest.mark.parametrize("exponent", [10**6, 10**17, -(10**17)])
def test_a_huge_exponent_is_not_written_out(exponent: int) -> None:
    assert author_name(f"12e{exponent}") == author_name(f"120e{exponent - 1}") == f"12e{exponent}"
