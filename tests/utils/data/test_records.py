"""Files -> records: every accepted format, the spans of answers, and one-line errors that show no record."""

from __future__ import annotations

import csv
import json
from itertools import chain
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from dptune._validate import InvalidArgument
from tests.tiny import tiny_tokenizer
from utils.data.record import Record
from utils.data.records import RowRecords, load_texts
from utils.data.sources import FileRows, numbered

ROWS = [{"instruction": "Add 2, 3.", "answer": "NA"}, {"instruction": 'Say "é"\nnow ', "answer": ""}]
EXPECTED = [Record("Add 2, 3.\nNA", ((10, 12),)), Record('Say "é"\nnow ', ((12, 12),))]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye you"},
    {"role": "user", "content": "still here"},
]
SECRET = "Jane Roe has measles"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def load(path: Path, tokenizer: PreTrainedTokenizerFast, style: str = "plain", split: str = "train") -> list[Record]:
    """The record of each row, made as for training."""
    rows = numbered(FileRows([path], "--train_file", split))
    place, row = next(rows)
    make = RowRecords(row, place, prompt_style=style, tokenizer=tokenizer)
    return [make(one, where) for where, one in chain([(place, row)], rows)]


def write(path: Path, content: object) -> Path:
    """A string as it stands, a list as JSON lines for .jsonl, anything else as JSON."""
    if path.suffix == ".jsonl" and isinstance(content, list):
        content = "\n".join(json.dumps(row) for row in content) + "\n\n"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_rows(path: Path, kind: str) -> Path:
    """ROWS in one of the accepted formats."""
    if kind == "dictionary":
        return write(path / "d.json", {name: [row[name] for row in ROWS] for name in ROWS[0]})
    if kind in ("json", "jsonl"):
        return write(path / f"d.{kind}", ROWS)
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path / "d.parquet")
        return path / "d.parquet"
    if kind == "csv":
        with (path / "d.csv").open("w", encoding="utf-8-sig", newline="") as file:  # Excel begins with a byte mark
            writer = csv.DictWriter(file, ["answer", "instruction"])
            writer.writeheader()
            writer.writerows(ROWS)
        return path / "d.csv"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path / "d"))
    return path / "d"


@pytest.mark.parametrize("kind", ["dictionary", "json", "jsonl", "csv", "parquet", "folder"])
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert load(write_rows(tmp_path, kind), tokenizer) == EXPECTED


def test_prompt_and_completion_are_joined_as_they_stand(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "Q: a\nA:", "completion": " b", "extra": 1}])
    assert load(path, tokenizer, style="chat") == [Record("Q: a\nA: b", ((7, 9),))]


def test_instruction_in_chat_style(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (record,) = load(write(tmp_path / "d.jsonl", [{"instruction": "Hi", "answer": "Yes?"}]), tokenizer, style="chat")
    assert record.text == "<|user|>\nHi</s>\n<|assistant|>\nYes?"
    assert [record.text[a:b] for a, b in record.answers] == ["Yes?"]


def test_instructions_themselves_are_learned_by_an_unconditional_generator(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"instruction": "Name a colour.", "answer": 5}, {"instruction": "", "answer": None}]  # answers: not read
    records = load(write(tmp_path / "d.jsonl", rows), tokenizer, style="uncond_generation")
    assert records == [Record("Name a colour.", ((0, 14),)), Record("", ((0, 0),))]
    alone = load(write(tmp_path / "e.jsonl", [{"instruction": "Hi"}]), tokenizer, style="uncond_generation")
    assert alone == [Record("Hi", ((0, 2),))]
    with pytest.raises(InvalidArgument, match="learns `instruction`"):
        load(write(tmp_path / "f.jsonl", [{"prompt": SECRET, "completion": "b"}]), tokenizer, style="uncond_generation")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_assistant_turn_is_an_answer_with_its_end(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        write(path, [{"messages": CHAT}])
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}]), path)
    (record,) = load(path, tokenizer)
    assert [record.text[a:b] for a, b in record.answers] == ["Yes?</s>", "Bye you</s>"]
    assert record.text.endswith("Bye you</s>")  # a user's last turn, which nothing answers, is left out


def test_a_conversation_without_an_answer_stays(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (record,) = load(write(tmp_path / "d.jsonl", [{"messages": CHAT[:1]}]), tokenizer)
    assert record.answers == ()


@pytest.mark.parametrize(
    ("template", "what"),
    [
        # Shows the number of turns at the start: no prefix of the whole.
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "differently when more follow",
        ),
        # Shows earlier answers in short, as templates do that drop reasoning.
        (
            "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}{% endfor %}",
            "differently when more follow",
        ),
        # The generation prompt is not what the turn then begins with.
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
            "differently when more follow",
        ),
        ("{{ raise_exception(messages[0]['content']) }}", "refuses these turns"),
    ],
)
def test_templates_whose_answers_cannot_be_found_are_refused(tmp_path: Path, template: str, what: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": SECRET}, *CHAT[1:]]
    path = write(tmp_path / "d.jsonl", [{"messages": messages}])
    with pytest.raises(InvalidArgument, match=rf"--train_file=.*row 1 .*{what}") as caught:
        load(path, tokenizer)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[9].content }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for m in 7 %}{% endfor %}",
        "{% if %}",
    ],
)
@pytest.mark.parametrize("columns", ["messages", "instruction"])
def test_whatever_a_template_raises_names_the_row_and_shows_nothing(
    tmp_path: Path, template: str, columns: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    row = {"messages": [{"role": "user", "content": SECRET}, *CHAT[1:]]}
    path = write(tmp_path / "d.jsonl", [row if columns == "messages" else {"instruction": SECRET, "answer": "b"}])
    with pytest.raises(
        InvalidArgument, match=r"row 1 \(counted from 1\): the chat template fails on .*Error\)"
    ) as caught:
        load(path, tokenizer, style="chat")
    assert SECRET not in str(caught.value)


def test_a_conversation_may_begin_with_the_assistant(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    greeting = {"role": "assistant", "content": "Welcome!"}
    path = write(tmp_path / "d.jsonl", [{"messages": CHAT}, {"messages": [greeting, *CHAT]}])
    _, record = load(path, tokenizer)
    assert [record.text[a:b] for a, b in record.answers] == ["Welcome!</s>", "Yes?</s>", "Bye you</s>"]
    strict = tiny_tokenizer()
    strict.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + str(
        strict.chat_template
    )
    with pytest.raises(InvalidArgument, match=r"row 2 \(counted from 1\): the chat template refuses these turns"):
        load(path, strict)


TYPED = "a</s>b<s>"


@pytest.mark.parametrize(
    ("row", "style", "typed", "answers"),
    [
        ({"instruction": TYPED, "answer": TYPED}, "plain", [(1, 5), (6, 9), (11, 15), (16, 19)], [TYPED]),
        ({"instruction": TYPED, "answer": TYPED + "</s>"}, "as_is", [(10, 14), (15, 18)], [TYPED + "</s>"]),
        ({"instruction": "", "answer": TYPED}, "chat", [(29, 33), (34, 37)], [TYPED]),
        ({"instruction": TYPED}, "uncond_generation", [(1, 5), (6, 9)], [TYPED]),
        ({"prompt": TYPED, "completion": TYPED + "</s>"}, "plain", [(10, 14), (15, 18)], [TYPED + "</s>"]),
        (
            {"messages": [{"role": "user", "content": TYPED}, {"role": "assistant", "content": TYPED}]},
            "plain",
            [(10, 14), (15, 18), (38, 42), (43, 46)],
            [TYPED + "</s>"],
        ),
    ],
)
def test_special_tokens_that_people_type_are_text(
    tmp_path: Path,
    row: dict[str, object],
    style: str,
    typed: list[tuple[int, int]],
    answers: list[str],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (record,) = load(write(tmp_path / "d.jsonl", [row]), tokenizer, style=style)
    assert list(record.typed) == typed
    assert {record.text[a:b] for a, b in record.typed} == {"</s>", "<s>"}
    assert [record.text[a:b] for a, b in record.answers] == answers


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "completion": "b", "input": SECRET}, "input"),
        ({"instruction": "a", "answer": "b", "context": [SECRET]}, "context"),
        ({"prompt": "a", "completion": "b", "system": SECRET}, "system"),
        ({"messages": CHAT, "history": [{"name": SECRET}]}, "history"),
    ],
)
def test_columns_that_belong_to_the_prompt_are_not_left_out_in_silence(
    tmp_path: Path, row: dict[str, object], name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    blank = {**row, name: "" if isinstance(row[name], str) else None}
    assert len(load(write(tmp_path / "b.jsonl", [blank]), tokenizer)) == 1
    with pytest.raises(InvalidArgument, match=rf"row 2 \(counted from 1\): {name} would be left out") as caught:
        load(write(tmp_path / "d.jsonl", [blank, row]), tokenizer)
    assert SECRET not in str(caught.value)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidArgument, match="no chat template"):
        load(write(tmp_path / "d.jsonl", [{"messages": CHAT}]), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("d.json", {"instruction": ["a", "b", "c"], "answer": [SECRET]}, "instruction has 3, answer has 1"),
        ("d.json", {"instruction": SECRET, "answer": SECRET}, "must be a list; change instruction, answer"),
        ("d.json", '{"instruction": ["a"],\n "answer": ["' + SECRET + '"]', "not JSON at line 2, column 36"),
        ("d.json", json.dumps({"a": SECRET}) + "\n" + json.dumps({"a": SECRET}), r"line 2.*\.jsonl"),
        ("d.json", [SECRET], "a list of dictionaries"),
        ("d.json", [], "empty"),
        ("d.json", {}, "empty"),
        (
            "d.jsonl",
            [{"question": SECRET}],
            "found the columns question; name them instruction/answer, or instruction/output, or pro",
        ),
        ("d.jsonl", [{SECRET: SECRET}], r"columns \(name not shown\)"),
        ("d.jsonl", [*ROWS, {"instruction": SECRET}], "row 3 .*answer is missing"),
        ("d.jsonl", [*ROWS, {"instruction": SECRET, "answer": None}], "row 3 .*answer is not text .no value"),
        ("d.jsonl", [*ROWS, {"instruction": SECRET, "answer": 7}], "row 3 .*answer is not text .int"),
        ("d.jsonl", '{"instruction": "a", "answer": "\\ud800"}', "row 1 .*surrogate"),
        ("d.jsonl", '{"instruction": "a", "answer": "b"}\n{"instruction": "' + SECRET, "line 2 is not JSON"),
        ("d.jsonl", f'"{SECRET}"', "line 1 is not a JSON object"),
        ("d.jsonl", "\n\n", "empty"),
        ("d.jsonl", "", "empty"),
        ("d.jsonl", [{"messages": SECRET}], "row 1 .*messages must be a list"),
        ("d.jsonl", [{"messages": []}], "row 1 .*messages must be a list"),
        (
            "d.jsonl",
            [{"messages": [CHAT[0], {"role": "assistant", "content": None}]}],
            "message 2 has no text as its con",
        ),
        ("d.csv", f"{SECRET},b\n", "empty"),
        ("d.csv", f'"{SECRET}",b\nc,d\n', r"\(name not shown\), b"),
        ("d.csv", f"instruction,answer\na,b,{SECRET}\n", "line 2 has more values than the header"),
        ("d.csv", f"instruction,answer\na,b\n{SECRET}\n", "row 2 .*answer is not text .no value"),
        ("d.csv", f'instruction,answer\na,"{SECRET}\n', "not CSV near line 1"),
        ("d.parquet", SECRET, "not a Parquet file"),
        ("d.txt", SECRET, r"unknown kind of file; give \.json, \.jsonl, \.csv, \.tsv"),
    ],
)
def test_bad_files_are_refused_without_showing_a_record(
    tmp_path: Path, name: str, content: object, what: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InvalidArgument, match=what) as caught:
        load(path, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"--train_file={str(path)!r}: ")
    assert SECRET not in message
    assert "\n" not in message


def test_missing_file_and_other_encoding(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidArgument, match="no such file"):
        load(tmp_path / "none.json", tokenizer)
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "é", "answer": "b"}'.encode("latin-1"))
    with pytest.raises(InvalidArgument, match="UTF-8"):
        load(tmp_path / "latin.jsonl", tokenizer)


def test_no_copy_of_the_data_is_left_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whatever the format, no cache folder of `datasets` gets a file."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for kind in ("json", "csv", "parquet", "folder"):
        load(write_rows(tmp_path, kind), tokenizer)
    assert not cache.exists()


def texts(path: Path, **changed: str | None) -> list[Record]:
    return load_texts(path, **{"flag": "--train_file", "column": "body"} | changed)


def test_a_text_is_learned_whole_and_keeps_its_author(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"body": "a b", "who": 7.0}, {"body": "", "who": None}])
    assert texts(path) == [Record("a b", ((0, 3),)), Record("", ((0, 0),))]
    assert [record.author for record in texts(path, author_column="who")] == ["7", None]


def test_texts_that_name_people_are_refused_unless_authors_are_the_unit(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"body": "a b", "user_id": 7}])
    for column in (None, "user_id", "body"):
        named = column or "user_id"
        with pytest.raises(
            InvalidArgument, match=rf"names users in {named}; give --authors {named}, or --ignore_users"
        ):
            texts(path, author_column=column, users_flag="--authors")
    assert len(texts(path)) == 1


def test_special_tokens_in_a_text_are_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "x.jsonl", [{"body": "a</s>b</s>"}])
    (record,) = load_texts(path, flag="--train_file", column="body", tokenizer=tokenizer)
    assert (record.text, record.answers, record.typed) == ("a</s>b</s>", ((0, 10),), ((1, 5),))


def test_a_row_without_a_text_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"body": SECRET, "who": "a"}, {"body": None, "who": "a"}])
    with pytest.raises(InvalidArgument, match="row 2") as error:
        texts(path)
    assert SECRET not in str(error.value)
    with pytest.raises(InvalidArgument, match="--text_column='text': no such column"):
        texts(path, column="text")
    with pytest.raises(InvalidArgument, match="--author_column='name': no such column"):
        texts(path, author_column="name")
