"""What a cell holds, or one line that names its row and never shows it."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.files.cells import Place, author_of, is_text, kind_of, require_columns, text_of

PLACE = Place("--train_file", "a.jsonl", 3)
SECRET = "Jane Roe"


def test_a_refusal_names_the_row() -> None:
    with pytest.raises(InvalidArgument, match=r"^--train_file='a\.jsonl': row 3 \(counted from 1\): fix it$"):
        PLACE.refuse("fix it")


@pytest.mark.parametrize(
    ("value", "expected"), [("", True), ("é 🙂", True), ("half \ud800", False), (7, False), (None, False)]
)
def test_text_is_a_string_without_half_a_pair(value: object, expected: bool) -> None:
    assert is_text(value) == expected


def test_a_missing_column_is_named_and_an_empty_one_is_none() -> None:
    require_columns({"a": None, "b": 1}, ("a", "b"), PLACE)
    with pytest.raises(InvalidArgument, match=r"row 3 .*: c is missing") as caught:
        require_columns({"a": SECRET}, ("a", "c"), PLACE)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "no value"), (7, "int"), ([SECRET], "list"), (SECRET + "\udfff", "half a surrogate pair")],
)
def test_a_value_that_is_not_text_is_refused_by_kind_and_not_shown(value: object, kind: str) -> None:
    assert kind_of(value).startswith(kind)
    with pytest.raises(InvalidArgument, match=rf"row 3 .*: note is not text \({kind}") as caught:
        text_of({"note": value}, "note", PLACE)
    assert SECRET not in str(caught.value)
    assert text_of({"note": " a "}, "note", PLACE) == " a "


@pytest.mark.parametrize(
    ("row", "author"),
    [({"who": " ann "}, "ann"), ({"who": 7.0}, "7"), ({"who": "7e0"}, "7"), ({"who": None}, None), ({}, None)],
)
def test_an_author_is_a_name_a_number_or_none(row: dict[str, object], author: str | None) -> None:
    assert author_of(row, "who", PLACE) == author


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([SECRET], r"neither text nor a number \(list\)"),
        (SECRET + "\ud800", "half of a surrogate"),
        (2.0**60, r"floating-point number of 2\^53 or more, whose last digits may be lost; write it as text"),
        ("1152921504606846976.0", r"floating-point number of 2\^53 or more"),
    ],
)
def test_an_invalid_author_is_refused_and_not_shown(value: object, told: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"row 3 .*: who .*{told}") as caught:
        author_of({"who": value}, "who", PLACE)
    assert SECRET not in str(caught.value)
    assert "1152921504606846976" not in str(caught.value)
