"""The name of an author as a cell of a file spells it: one person has one name, however a file stores it.

Every reader of a column of people uses `author_name`. Two spellings of one number are one name, because formats and
programs store a column of numbers in different ways. Treating two people as one only protects them better. Treating one
person as two protects each of the two, but the person less than stated.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

import numpy as np

_NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d{1,18}))?")
_FLOATING = re.compile(
    r"\.|e\+", re.IGNORECASE
)  # how programs write floating-point numbers; hexadecimal ids have neither
_SIGNS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-") | {"\u066b": "."})
_NOT_SEEN = {"Cf", "Cc"}  # Unicode's categories of format and control characters
_FILLERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_MOST_DIGITS = 400  # written out; longer numbers get an exponent
_DOUBLE_BITS = 53  # a floating-point number of 2^53 or more may have lost its last digits


def author_name(value: object) -> str | None:
    """The author that a cell names, or None if it names nobody (empty, NaN, white space).

    7, "7", 7.0, "7.0", "7e0", " 7 " and "007" are one author, and so is 7 with full-width or Arabic digits. A dash
    before a number is a minus sign. "1,000", "1 000" and "1_000" are names of their own, as a comma may stand for a
    thousand or for a fraction.

    Names are compared in Unicode's form NFKC, without invisible characters and white space around them; white space
    within is one space. Upper and lower case differ. The text "nan" is a name.

    Raises:
        TypeError: the value is neither text nor a number.
        ValueError: a number of 2^53 or more is stored or written as a floating-point number. Its last digits may be
            lost, so two people could share it, and one person could have two.

    >>> author_name(" ann "), author_name(7.0), author_name("7e0"), author_name("007"), author_name(float("nan"))
    ('ann', '7', '7', '7', None)
    """
    if value is None:
        return None
    if isinstance(value, str):
        name = _visible(value)
        number = name.translate(_SIGNS)
        return _number(number, _DOUBLE_BITS if _FLOATING.search(number) else None) or name or None
    if isinstance(value, bool | np.bool_):
        raise TypeError(type(value).__name__)
    if isinstance(value, int | np.integer):
        return _number(str(int(value)))
    if isinstance(value, Decimal):
        return None if value.is_nan() else _of_decimal(value)
    if not isinstance(value, float | np.floating):
        raise TypeError(type(value).__name__)
    if np.isnan(value):
        return None
    bits = np.finfo(type(value)).nmant + 1
    return _number(np.format_float_scientific(value), bits) or str(float(value))


def author_names(values: Iterable[object]) -> list[str | None]:
    """`author_name` of each value."""
    return [author_name(value) for value in values]


def _visible(text: str) -> str:
    """What a reader sees of a name: without invisible characters, in one Unicode form, with single spaces."""
    if not (text.isascii() and text.isprintable()):
        seen = (one for one in text if one.isspace() or unicodedata.category(one) not in _NOT_SEEN)
        text = unicodedata.normalize("NFKC", _FILLERS.sub("", "".join(seen)))
    return " ".join(text.split())


def _number(text: str, bits: int | None = None) -> str | None:
    """The one spelling of the number that `text` spells; None if it spells none.

    Args:
        text: without white space around it.
        bits: precision of the floating-point type that it went through, if any.
    """
    found = _NUMBER.fullmatch(text)
    if found is None or not (found[2] or found[3]):
        return None
    whole, fraction, exponent = found[2], found[3] or "", int(found[4] or 0)
    digits = "".join(str(unicodedata.decimal(digit)) for digit in whole + fraction)
    if bits is not None and _reaches(digits, exponent - len(fraction), 2**bits):
        raise ValueError(f"a floating-point number of 2^{bits} or more")
    return _spelled(found[1] == "-", digits, exponent - len(fraction))


def _reaches(digits: str, exponent: int, limit: int) -> bool:
    """Whether digits x 10^exponent is at least `limit`, without writing out a huge power."""
    digits = digits.lstrip("0")
    places = len(digits) + exponent  # before the decimal point
    if not digits or places != len(str(limit)):
        return bool(digits) and places > len(str(limit))
    return int((digits + "0" * exponent)[:places]) >= limit


def _of_decimal(value: Decimal) -> str:
    sign, digits, exponent = value.as_tuple()
    return _spelled(bool(sign), "".join(map(str, digits)), exponent) if isinstance(exponent, int) else str(value)


def _spelled(negative: bool, digits: str, exponent: int) -> str:
    """digits x 10^exponent without leading or trailing zeros, in plain notation unless it is very long."""
    shortest = digits.rstrip("0")
    exponent += len(digits) - len(shortest)
    shortest = shortest.lstrip("0")
    if not shortest:
        return "0"
    sign = "-" if negative else ""
    if abs(exponent) + len(shortest) > _MOST_DIGITS:
        return f"{sign}{shortest}e{exponent}"
    if exponent >= 0:
        return sign + shortest + "0" * exponent
    padded = shortest.rjust(1 - exponent, "0")
    return f"{sign}{padded[:exponent]}.{padded[exponent:]}"
