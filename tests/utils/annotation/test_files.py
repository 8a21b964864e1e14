"""The folder of an annotation: what is noted stays, what a crash tore is left out, another run is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.annotation.files import (
    Prices,
    Question,
    ReplyJournal,
    annotation_identity,
    make_questions,
    write_annotations,
)
from utils.annotation.replies import Reply
from utils.files.tables import read_rows

SETTINGS = {"model": "m", "max_tokens": 16, "system_prompt": None}
ROWS = [{"id": str(number), "instruction": text, "topic": number} for number, text in enumerate(["a\u2028b", "c", "d"])]


def folder_with(tmp_path: Path, replies: dict[int, Reply]) -> tuple[ReplyJournal, list[Question]]:
    questions = make_questions(ROWS, SETTINGS)
    journal = ReplyJournal(tmp_path / "out")
    journal.claim(annotation_identity(questions, SETTINGS))
    for number, reply in replies.items():
        journal.add(questions[number], reply)
    return journal, questions


def test_a_reply_is_read_back_and_the_last_one_counts(tmp_path: Path) -> None:
    journal, questions = folder_with(tmp_path, {0: Reply("Größe\u2028 1\n", None, "m", 3, 4), 1: Reply(reason="no")})
    journal.add(questions[1], Reply("better"))
    settled = ReplyJournal(tmp_path / "out").settled()
    assert settled == {questions[0].key: Reply("Größe\u2028 1\n", None, "m", 3, 4), questions[1].key: Reply("better")}


def test_what_was_set_aside_may_be_asked_again(tmp_path: Path) -> None:
    journal, questions = folder_with(tmp_path, {0: Reply("yes"), 1: Reply(reason="no")})
    assert journal.settled(answered_only=True).keys() == {questions[0].key}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_line_is_no_reply_and_spoils_none(tmp_path: Path, cut: int) -> None:
    journal, questions = folder_with(tmp_path, {0: Reply("yes"), 1: Reply("größer")})
    path = tmp_path / "out" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    if cut > 1:
        assert journal.settled().keys() == {questions[0].key}
    journal.add(questions[2], Reply("after"))
    expected = {questions[0].key, questions[2].key} | ({questions[1].key} if cut == 1 else set())
    assert journal.settled().keys() == expected


def test_rows_with_one_id_and_text_are_one_question_and_all_else_matters() -> None:
    row = {"id": "1", "instruction": "a"}
    (first, copy) = make_questions([row, {**row, "topic": 9}], SETTINGS)
    assert first.key == copy.key
    others = [
        ({**row, "id": "2"}, SETTINGS),
        ({**row, "instruction": "b"}, SETTINGS),
        (row, {**SETTINGS, "model": "n"}),
    ]
    assert len({first.key, *(make_questions([one], settings)[0].key for one, settings in others)}) == 4


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        (ROWS, {**SETTINGS, "model": "n"}, "model was 'm' and is 'n'"),
        (ROWS, {**SETTINGS, "system_prompt": "x" * 200}, r"system_prompt was None and is 'x+\.\.\."),
        (ROWS, {**SETTINGS, "temperature": 0.5}, "temperature was None and is 0.5"),
        (ROWS[:2], SETTINGS, "num_rows was 3 and is 2, input_sha256 was"),
        (ROWS[::-1], SETTINGS, "input_sha256 was"),
    ],
)
def test_a_folder_holds_answers_to_one_thing(tmp_path: Path, rows: list, settings: dict, told: str) -> None:
    journal, questions = folder_with(tmp_path, {})
    journal.claim(annotation_identity(make_questions(rows, settings), settings))  # there are no answers yet
    journal.claim(annotation_identity(questions, SETTINGS))
    journal.add(questions[0], Reply("one"))
    with pytest.raises(InvalidArgument, match=f"--output_dir=.*{told}.*give another folder"):
        journal.claim(annotation_identity(make_questions(rows, settings), settings))


def test_outputs_carry_rows_along_in_order_and_count_what_was_paid(tmp_path: Path) -> None:
    cut = Reply(None, "cut", "m", 2_000_000, 1_000_000)
    journal, questions = folder_with(
        tmp_path, {2: Reply("two", None, "m-2"), 1: cut, 0: Reply("zero", None, "m", 1, 2)}
    )
    journal.add(questions[1], cut)
    summary = write_annotations(tmp_path / "out", questions, journal, SETTINGS, Prices(0.5, 2.0))
    answered = [{**ROWS[0], "answer": "zero"}, {**ROWS[2], "answer": "two"}]
    assert read_rows(tmp_path / "out" / "annotated.jsonl", "--file") == answered
    assert read_rows(tmp_path / "out" / "set_aside.jsonl", "--file") == [{**ROWS[1], "reason": "cut"}]
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["answered_by"] == ["m", "m-2"]
    assert (summary["rows"], summary["answered"], summary["set_aside"], summary["reasons"]) == (3, 2, 1, {"cut": 1})
    assert (summary["replies"], summary["replies_without_token_counts"]) == (4, 1)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (4_000_001, 2_000_002)
    assert summary["cost"] == pytest.approx(4_000_001 * 0.5e-6 + 2_000_002 * 2e-6)


@pytest.mark.parametrize("prices", [Prices(), Prices(prompt=1.0), Prices(completion=1.0)])
def test_without_both_prices_there_is_no_cost(prices: Prices) -> None:
    assert prices.cost(10, 10) is None
