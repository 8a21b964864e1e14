"""The first question of either format, and what is no question."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.conversation_texts import Question, Unusable, first_question, normalised


def lmsys(*turns: tuple[str, object]) -> dict[str, object]:
    return {"conversation_id": "c", "conversation": [{"role": who, "content": what} for who, what in turns]}


def sharegpt(*turns: tuple[str, object]) -> dict[str, object]:
    return {"id": "s", "conversations": [{"from": who, "value": what} for who, what in turns]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            lmsys(("user", " Who is NAME_1? "), ("assistant", " NAME_1 is\n")),
            Question("Who is NAME_1?", " NAME_1 is\n"),
        ),
        (lmsys(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), Question("a", "b")),
        (lmsys(("system", "s"), ("user", "a"), ("assistant", "b")), Question("a", "b")),
        (sharegpt(("human", "a"), ("gpt", "b")), Question("a", "b")),
        (sharegpt(("gpt", "earlier"), ("human", "a"), ("gpt", "b")), Question("a", "b")),
        (sharegpt(("Human ", "a")), Question("a", None)),
        (sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")), Question("a", None)),
        (lmsys(("user", "a"), ("assistant", " ")), Question("a", None)),
    ],
)
def test_the_first_question_and_the_reply_to_it(row: dict[str, object], expected: Question) -> None:
    assert first_question(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "no conversation"),
        (lmsys(), "no conversation"),
        ({"conversation": "hello"}, "no conversation"),
        ({"conversation": None}, "no conversation"),
        (lmsys(("assistant", "a")), "no turn of a user"),
        (lmsys(("user", " \n")), "a blank question"),
        (lmsys(("user", None)), "a damaged turn"),
        (lmsys(("user", "half \ud800 a pair")), "a damaged turn"),
        ({"conversation": ["a"]}, "a damaged turn"),
        (sharegpt(("human", "a"), ("gpt", 7)), "a damaged turn"),
    ],
)
def test_what_is_no_question_has_a_reason(row: dict[str, object], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        first_question(row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Gro\u0308ße", "Größe"),
        ("a \t b\u00a0 c", "a b c"),
        ("a  \r\nb\rc", "a\nb\nc"),
        ("def f():\n    return  1\n\n\n\n\tx", "def f():\n    return 1\n\n\tx"),
        ("\n  a\n", "a"),
    ],
)
def test_white_space_and_composed_letters_are_made_alike(text: str, expected: str) -> None:
    assert normalised(text) == expected


@given(st.text(alphabet=st.sampled_from(" \t\n\r\u00a0a\u0308Ab"), max_size=30))
def test_what_is_normalised_stays(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
