"""Files of conversations in, instructions and counts out."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dptune._validate import InvalidArgument
from dptune.units.unit import PrivacyUnit
from scripts import prepare_conversations
from utils.data.records import load_texts
from utils.files.tables import read_rows


def lmsys(number: int, question: str, **more: Any) -> dict[str, Any]:
    turns = [{"content": question, "role": "user"}, {"content": f"reply {number}", "role": "assistant"}]
    return {"conversation_id": f"c{number}", "model": "m", "conversation": turns, "turn": 1, **more}


def prepare(tmp_path: Path, rows: list[Any], *more: str, name: str = "in.jsonl") -> list[dict[str, Any]]:
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    prepare_conversations.main(["--input_file", str(path), "--output_file", str(tmp_path / "out.jsonl"), *more])
    return read_rows(tmp_path / "out.jsonl", "--file")


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.parquet"])
def test_lmsys_conversations_become_instructions(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        lmsys(0, "Who is NAME_1?", language="English"),
        lmsys(1, "Wer ist NAME_1?", language="German"),
        lmsys(2, "Who  is NAME_1?", language="English"),
        lmsys(3, "What is a kernel?", language="English"),
        lmsys(4, "eh", language="English"),
    ]
    kept = prepare(tmp_path, rows, "--language", "English", "--min_chars", "3", name=name)
    assert [row["instruction"] for row in kept] == ["Who is NAME_1?", "What is a kernel?"]
    assert all(set(row) == {"id", "instruction"} for row in kept)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"read 5 conversations, kept 2: {tmp_path / 'out.jsonl'}"
    assert set(told[1:4]) == {f"left out 1: {reason}" for reason in ("another language", "a copy", "too short")}
    assert told[4].startswith("privacy unit: a distinct row (2 units).")
    assert "NOT PRIVATE" in told[4]


def test_sharegpt_conversations_become_pairs(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Sort a list."}, {"from": "gpt", "value": "sorted(x)"}]
    rows = [{"id": "s0", "conversations": turns}, {"id": "s1", "conversations": turns[:1]}]
    (kept,) = prepare(tmp_path, rows, "--keep_answers", name="in.json")
    assert (kept["instruction"], kept["answer"]) == ("Sort a list.", "sorted(x)")


def test_several_files_are_one_and_copies_are_found_across_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(lmsys(0, "one")) + "\n" + json.dumps(lmsys(1, "two")))
    (tmp_path / "b.json").write_text(json.dumps([lmsys(2, "two "), lmsys(3, "three")]))
    files, output = [str(tmp_path / name) for name in ("a.jsonl", "b.json")], tmp_path / "new" / "out.jsonl"
    prepare_conversations.main(["--input_file", *files, "--output_file", str(output)])
    assert [row["instruction"] for row in read_rows(output, "--file")] == ["one", "two", "three"]


def test_users_are_the_unit_and_the_trainer_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = ["ann", "bob", "ann ", None, 7, None]
    rows = [lmsys(i, "same" if i != 4 else "other", hashed_ip=user) for i, user in enumerate(users)]
    kept = prepare(tmp_path, rows, "--user_column", "hashed_ip")
    assert [row.get("user") for row in kept] == ["ann", "bob", None, "7"]
    assert "privacy unit: a user, or a row without a user (4 units)." in capsys.readouterr().out
    records = load_texts(
        tmp_path / "out.jsonl", flag="--f", column="instruction", author_column=PrivacyUnit("user").column
    )
    assert [record.author for record in records] == ["ann", "bob", None, "7"]


def test_users_that_nobody_thought_of_are_refused(tmp_path: Path) -> None:
    rows = [lmsys(0, "same"), lmsys(1, "same", user_id="u2")]  # the second row alone names one
    with pytest.raises(InvalidArgument, match="names users in user_id; give --user_column user_id, or --ignore_users"):
        prepare(tmp_path, rows)
    assert not (tmp_path / "out.jsonl").exists()
    assert len(prepare(tmp_path, rows, "--ignore_users")) == 1


def test_a_language_is_identified_where_the_file_names_none(tmp_path: Path) -> None:
    rows = [
        lmsys(0, "Please write a short letter to my landlord about the heating."),
        lmsys(1, "Bitte schreibe meinem Vermieter einen kurzen Brief über die Heizung."),
    ]
    (kept,) = prepare(tmp_path, rows, "--language", "de")
    assert kept["instruction"].startswith("Bitte")
    with pytest.raises(InvalidArgument, match="give a code such as en"):
        prepare(tmp_path, rows, "--language", "German")


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([{"text": "secret"}], [], "found the columns text; one must be conversation or conversations"),
        ([lmsys(0, "a")], ["--user_column", "who"], "--user_column='who': no such column"),
        ([lmsys(0, "secret")], ["--min_chars", "50"], r"nothing is kept \(1 too short\)"),
        ([lmsys(0, "secret", language="English")], ["--language", "en"], "is 'en' what the column language calls it"),
        ([], [], r"is empty"),
        ([lmsys(0, "a", who="u")], ["--user_column", "who", "--ignore_users"], "--ignore_users"),
    ],
)
def test_what_gives_nothing_is_refused_and_leaves_nothing(
    tmp_path: Path, rows: list[Any], more: list[str], told: str
) -> None:
    with pytest.raises(InvalidArgument, match=told) as caught:
        prepare(tmp_path, rows, *more)
    assert "secret" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(("name", "told"), [("out.json", "ends in .jsonl"), ("in.jsonl", "is an input file")])
def test_an_output_that_would_do_harm_is_refused(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(lmsys(0, "a")))
    line = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / name)]
    with pytest.raises(InvalidArgument, match=told):
        prepare_conversations.main(line)
    assert json.loads((tmp_path / "in.jsonl").read_text())["conversation_id"] == "c0"


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    count, size = 200, 50_000
    prepare(tmp_path, [lmsys(0, "what is imported and cached stays out of the count")])
    with (tmp_path / "in.jsonl").open("w") as file:
        file.writelines(json.dumps(lmsys(i, f"{i} {'w' * size}")) + "\n" for i in range(count))
    line = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / "out.jsonl")]
    tracemalloc.start()
    try:
        prepare_conversations.main(line)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < count * size / 4, f"{peak} bytes for texts of {count * size}"
