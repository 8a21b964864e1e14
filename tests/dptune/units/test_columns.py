"""Columns that name people, under any name."""

from __future__ import annotations

import pytest

from dptune.units.columns import names_users


@pytest.mark.parametrize(
    "name",
    [
        *("user", "UserID", "user_name", "username", "hashed_ip", "ip address", "Author", "email", "Speaker"),
        *("sender_id", "author_email", "speaker name", "posted_by", "phone", "customer-number", "reviewerID"),
        *("users", "authors", "user_names", "hashed_user_id", "anon_user_id", "user_id_str", "from_user", "id_user"),
        *("user_handle", "author_username", "tweet_author", "mail", "contributor_id", "e-mail", "userids", "user.id"),
        *("userIdentifier", "iduser", "user_id_2", "screen_name", "hashedIP", "patient_no", "essayAuthor", "logins"),
    ],
)
def test_a_column_of_people_is_known_in_any_spelling(name: str) -> None:
    assert names_users(name)


@pytest.mark.parametrize(
    "name",
    [
        *("id", "name", "title", "subject", "label", "source", "input", "idx", "qid1", "annotator_labels", "by_line"),
        *("text", "answer", "language", "turns", "user_turns", "input_ids", "attention_mask", "token_type_ids"),
        *("user_message", "customer_review", "author_notes", "num_users", "is_author", "users_count", "by_user_count"),
        *("user_prompt", "speaker_text", "reply_to_user", "full", "address", "number", "ids", "hash", "", "日本語"),
    ],
)
def test_other_columns_are_not(name: str) -> None:
    assert not names_users(name)
