"""Columns that name people, under any name."""

from __future__ import annotations

import pytest

from dptune.units.columns import names_users


@pytest.mark.parametrize(
    "name",
    [
        *("user", "UserID", "user_name", "username", "hashed_ip", "ip address", "Author", "email", "Speaker"),
        *("sender_id", "author_email", "speaker name", "posted_by", "phone", "customer-number", "reviewerID"),
    ],
)
def test_a_column_of_people_is_known_in_any_spelling(name: str) -> None:
    assert names_users(name)


@pytest.mark.parametrize(
    "name",
    [
        *("id", "name", "title", "subject", "label", "source", "input", "idx", "qid1", "annotator_labels", "by_line"),
        *("text", "answer", "language", "turns", "user_turns", "input_ids", "attention_mask", "token_type_ids"),
    ],
)
def test_other_columns_are_not(name: str) -> None:
    assert not names_users(name)
