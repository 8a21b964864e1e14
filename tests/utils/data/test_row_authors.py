"""Files that name people, under any column name."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.data.row_authors import authors_of, refuse_unnoticed_users

ROWS = [{"text": "a"}, {"text": "b", "who": " ann "}]


@pytest.mark.parametrize("name", ["user", "Speaker"])
def test_a_column_of_people_is_noticed_in_any_row(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--file='a\.jsonl': names users in .*; give --privacy_unit"):
        refuse_unnoticed_users([*ROWS, {"text": "c", name: None}], "--file", "a.jsonl", "--privacy_unit")


def test_other_columns_are_not() -> None:
    usual = ["id", "name", "title", "subject", "label", "source", "input", "idx", "qid1", "annotator_labels", "by_line"]
    others = [*ROWS, {"answer": "c", "language": "en", "turns": 2, "user_turns": 1}, dict.fromkeys(usual, 1)]
    refuse_unnoticed_users(others, "--file", "a.jsonl", "--unit")
    with pytest.raises(InvalidArgument) as caught:
        refuse_unnoticed_users([*others, {"answer": "d", "user": 1}], "--file", "a.jsonl", "--unit")
    assert "names users in user; give --unit user, or" in str(caught.value)


def test_a_column_that_is_said_to_name_users_is_noticed_too() -> None:
    with pytest.raises(InvalidArgument, match="names users in who; give --unit who, or"):
        refuse_unnoticed_users(ROWS, "--file", "a.jsonl", "--unit", column="who")


def test_a_program_without_a_unit_of_users_says_so() -> None:
    told = "names users in user, but this program protects rows, .* give --ignore_users"
    with pytest.raises(InvalidArgument, match=told):
        refuse_unnoticed_users([{"user": 1}], "--file", "a.jsonl", None)


def test_each_row_has_its_author() -> None:
    assert authors_of(ROWS, "who", "--file", "a.jsonl") == [None, "ann"]


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--privacy_unit='whom': no such column"):
        authors_of(ROWS, "whom", "--file", "a.jsonl")


def test_an_author_that_is_a_list_is_refused_by_row_and_not_shown() -> None:
    with pytest.raises(InvalidArgument, match=r"row 3 \(counted from 1\): who is neither text nor a number") as caught:
        authors_of([*ROWS, {"who": ["Jane Roe"]}], "who", "--file", "a.jsonl")
    assert "Jane" not in str(caught.value)
