"""Removing a row, or a user, from the file removes at most that row, or that user's rows, from the output.

The privacy unit rests on this: epsilon counts the rows (or users) of the output as if each were one of the file.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptune._validate import InvalidArgument
from utils.data.conversations import FirstTurn, Selection, Unusable, first_question, instructions, normalised
from utils.data.languages import LanguageFilter
from utils.files.cells import Place

Row = dict[str, object]

UNIT_IS_A_ROW = [
    Selection(min_chars=2, max_chars=20),
    Selection(min_chars=2, keep_answers=True),
    Selection(language=LanguageFilter("English")),
]
UNIT_IS_A_USER = [Selection(min_chars=2, user_column="who"), Selection(user_column="who", keep_answers=True)]


def conversation(question: str, reply: str, who: object = None, language: str = "English", name: int = 0) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"conversation_id": f"c{name}", "conversation": turns, "who": who, "language": language}


def select(rows: list[Row], selection: Selection, left_out: Counter[str] | None = None) -> list[Row]:
    placed = [(Place("--input_file", "chats.jsonl", number), row) for number, row in enumerate(rows, start=1)]
    return list(instructions(placed, selection, Counter() if left_out is None else left_out))


def multiset(rows: list[Row]) -> Counter[tuple[tuple[str, object], ...]]:
    return Counter(tuple(sorted(row.items())) for row in rows)


def changes(before: list[Row], after: list[Row]) -> tuple[int, int]:
    """(removed rows, added rows)."""
    there, here = multiset(before), multiset(after)
    return (there - here).total(), (here - there).total()


# Few values, so that copies, variants of white space, and one question with several replies are common.
QUESTIONS = st.sampled_from(
    ["How are you?", "How  are you? ", "How are\u00a0you?", "Hi", "Hi\n", "x", "Größe", "Gro\u0308ße"]
)
CONVERSATIONS = st.builds(
    conversation,
    QUESTIONS,
    st.sampled_from(["fine", "fine ", "well", " "]),
    st.sampled_from(["ann", " ann ", "bob", 7, 7.0, None, ""]),
    st.sampled_from(["English", "German"]),
    st.integers(0, 99),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(CONVERSATIONS, min_size=1, max_size=8), st.data())
def test_a_row_of_the_file_is_one_row_of_the_output_or_none(rows: list[Row], data: st.DataObject) -> None:
    taken = data.draw(st.integers(0, len(rows) - 1))
    for selection in UNIT_IS_A_ROW:
        went, came = changes(select(rows, selection), select(rows[:taken] + rows[taken + 1 :], selection))
        assert went <= 1
        assert came == 0


@settings(max_examples=150, deadline=None)
@given(st.lists(CONVERSATIONS, min_size=1, max_size=8))
def test_a_user_of_the_file_is_that_users_rows_of_the_output(rows: list[Row]) -> None:
    named = {"ann": ("ann", " ann "), "bob": ("bob",), "7": (7, 7.0)}
    for selection in UNIT_IS_A_USER:
        whole = select(rows, selection)
        for user, spellings in named.items():
            without = select([row for row in rows if row["who"] not in spellings], selection)
            assert without == [row for row in whole if row.get("user") != user]


@settings(max_examples=100, deadline=None)
@given(st.lists(CONVERSATIONS, min_size=1, max_size=8), st.data())
def test_a_row_without_a_user_is_a_unit_by_itself(rows: list[Row], data: st.DataObject) -> None:
    nobodys = [number for number, row in enumerate(rows) if row["who"] in (None, "")]
    if nobodys:
        taken = data.draw(st.sampled_from(nobodys))
        for selection in UNIT_IS_A_USER:
            went, came = changes(select(rows, selection), select(rows[:taken] + rows[taken + 1 :], selection))
            assert (went <= 1, came) == (True, 0)


def test_copies_go_and_every_row_is_accounted_for() -> None:
    left_out: Counter[str] = Counter()
    rows = [
        conversation("How are you?", "fine"),
        conversation(" How  are you?", "well"),
        conversation("Gro\u0308ße?", "1.80 m"),
        conversation("Größe?", "1.80 m"),
        conversation("x", "y"),
        conversation("z" * 99, "y"),
        conversation("Wie geht es?", "gut", language="German"),
        {"conversation": []},
    ]
    selection = Selection(min_chars=2, max_chars=50, language=LanguageFilter("English"))
    kept = select(rows, selection, left_out)
    assert [row["instruction"] for row in kept] == ["How are you?", "Größe?"]
    assert all(set(row) == {"id", "instruction"} for row in kept)
    reasons = {"a copy": 2, "too short": 1, "too long": 1, "another language": 1, "no conversation": 1}
    assert left_out == reasons


def test_with_replies_a_copy_says_the_same_and_is_answered_the_same() -> None:
    rows = [conversation("Hi", reply) for reply in ("fine", "well", "fine", " ")]
    kept = select(rows, Selection(keep_answers=True), left_out := Counter())
    assert [(row["instruction"], row["answer"]) for row in kept] == [("Hi", "fine"), ("Hi", "well")]
    assert left_out == {"a copy": 1, "no reply": 1}


def test_users_keep_what_others_said_too_and_their_own_first_reply() -> None:
    rows = [conversation("Hi", "fine", "ann"), conversation("Hi", "well", "bob"), conversation("Hi", "good", " ann")]
    kept = select(rows, Selection(user_column="who", keep_answers=True))
    assert [(row["user"], row["answer"]) for row in kept] == [("ann", "fine"), ("bob", "well")]
    assert len({row["id"] for row in kept}) == 2


def test_an_id_follows_from_the_content_alone() -> None:
    first, second = (select([conversation("Hi", "fine", name=name)], Selection()) for name in (1, 2))
    assert first == second
    assert str(first[0]["id"]).startswith("conv-")


def test_the_length_counts_characters_of_what_is_written() -> None:
    rows = [conversation(f"  {'é' * size}  ", "y") for size in range(1, 7)]
    kept = select(rows, Selection(min_chars=2, max_chars=4))
    assert [len(str(row["instruction"])) for row in kept] == [2, 3, 4]


def test_a_user_that_is_no_name_is_refused_and_not_shown() -> None:
    with pytest.raises(InvalidArgument, match=r"row 1 .*who is neither text nor a number \(list\)") as caught:
        select([conversation("Hi", "fine", ["secret"])], Selection(user_column="who"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("least", "most"), [(0, None), (5, 4)])
def test_lengths_that_keep_nothing_are_refused(least: int, most: int | None) -> None:
    with pytest.raises(InvalidArgument, match="_chars"):
        Selection(min_chars=least, max_chars=most)


def lmsys(*turns: tuple[str, object]) -> dict[str, object]:
    return {"conversation_id": "c", "conversation": [{"role": who, "content": what} for who, what in turns]}


def sharegpt(*turns: tuple[str, object]) -> dict[str, object]:
    return {"id": "s", "conversations": [{"from": who, "value": what} for who, what in turns]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            lmsys(("user", " Who is NAME_1? "), ("assistant", " NAME_1 is\n")),
            FirstTurn("Who is NAME_1?", " NAME_1 is\n"),
        ),
        (lmsys(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), FirstTurn("a", "b")),
        (lmsys(("system", "s"), ("user", "a"), ("assistant", "b")), FirstTurn("a", "b")),
        (sharegpt(("human", "a"), ("gpt", "b")), FirstTurn("a", "b")),
        (sharegpt(("gpt", "earlier"), ("human", "a"), ("gpt", "b")), FirstTurn("a", "b")),
        (sharegpt(("Human ", "a")), FirstTurn("a", None)),
        (sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")), FirstTurn("a", None)),
        (lmsys(("user", "a"), ("assistant", " ")), FirstTurn("a", None)),
    ],
)
def test_the_first_question_and_the_reply_to_it(row: dict[str, object], expected: FirstTurn) -> None:
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
def test_a_row_without_a_question_has_a_reason(row: dict[str, object], reason: str) -> None:
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
def test_white_space_and_composed_letters_are_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


@given(st.text(alphabet=st.sampled_from(" \t\n\r\u00a0a\u0308Ab"), max_size=30))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
