"""A table gives the same rows in every format, large files are streamed, and errors are one line without content."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dptune._validate import InvalidArgument
from utils.data.instruction_files import read_instructions
from utils.files.compressed import COMPRESSIONS
from utils.files.tables import Row, has_validation_split, read_rows, show_columns, stream_rows

DEEP = "[" * 100_000
LONG = "9" * 5000
CHATS = [{"conversation": [{"role": "user", "content": f"Größe\u2028 {i}"}], "turn": i} for i in range(2500)]
# A gap in every column, what pandas would take for a gap, a whole number beyond 2**53, and NaN, which is no value.
TABLE: list[Row] = [
    {"text": "NA", "count": 7, "share": 0.5, "seen": True, "tags": ["a", None], "turn": {"who": "user", "score": 1.0}},
    {"text": None, "count": None, "share": None, "seen": None, "tags": None, "turn": None},
    {"text": " ", "count": 2**53 + 1, "share": 1.0, "seen": False, "tags": [], "turn": {"who": None, "score": None}},
]
WITH_NAN = [
    TABLE[0],
    {**TABLE[1], "share": math.nan},
    {**TABLE[2], "turn": {"who": None, "score": math.nan}},
]


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # Excel begins with a byte mark
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_compressed(text: str, path: Path) -> None:
    with pyarrow.output_stream(str(path), compression=COMPRESSIONS[path.suffix]) as file:
        file.write(text.encode())


def write_folder(rows: list[Row], path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))


WRITERS: dict[str, Callable[[list[Row], Path], object]] = {
    "a.json": lambda rows, path: path.write_text(json.dumps(rows)),
    "columns.json": lambda rows, path: path.write_text(json.dumps({n: [row[n] for row in rows] for n in rows[0]})),
    "a.jsonl": lambda rows, path: path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
    "a.parquet": lambda rows, path: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "a.PARQUET": lambda rows, path: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "a.jsonl.gz": lambda rows, path: write_compressed("".join(f"{json.dumps(row)}\n" for row in rows), path),
    "a.JSONL.zst": lambda rows, path: write_compressed("".join(f"{json.dumps(row)}\n" for row in rows), path),
    "a.json.zst": lambda rows, path: write_compressed(json.dumps(rows), path),
    "columns.json.gz": lambda rows, path: write_compressed(
        json.dumps({name: [row[name] for row in rows] for name in rows[0]}), path
    ),
    "folder": write_folder,
}


def written(rows: list[Row], path: Path) -> Path:
    WRITERS[path.name](rows, path)
    return path


def exactly(rows: list[Row]) -> str:
    """A text that distinguishes 7 from 7.0 and True from 1, and in which NaN equals NaN."""
    return repr(rows)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("rows", [TABLE, WITH_NAN], ids=["gaps", "nan"])
def test_every_format_gives_the_same_values(tmp_path: Path, name: str, rows: list[Row]) -> None:
    assert exactly(read_rows(written(rows, tmp_path / name), "--f")) == exactly(TABLE)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_streams_what_is_read(tmp_path: Path, name: str) -> None:
    path = written(CHATS, tmp_path / name)
    assert list(stream_rows(path, "--f")) == read_rows(path, "--f") == CHATS


def test_a_csv_gives_the_same_rows_as_text(tmp_path: Path) -> None:
    plain = [{name: row[name] for name in ("text", "count", "share")} for row in TABLE]
    write_csv(plain, tmp_path / "a.csv")
    comma = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.tsv").write_text(comma.replace(",", "\t"))
    write_compressed(comma, tmp_path / "a.csv.gz")
    as_text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in plain]
    for name in ("a.csv", "a.tsv", "a.csv.gz"):
        assert read_rows(tmp_path / name, "--f") == as_text


def test_rows_can_be_written_as_json(tmp_path: Path) -> None:
    for name in WRITERS:
        for row in read_rows(written(WITH_NAN, tmp_path / name), "--f"):
            assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_saved_folder_in_another_format_and_order_gives_plain_rows(tmp_path: Path) -> None:
    kept = datasets.Dataset.from_list(TABLE).select([2, 0]).with_format("numpy")
    datasets.DatasetDict({"train": kept}).save_to_disk(str(tmp_path / "d"))
    assert exactly(read_rows(tmp_path / "d", "--f")) == exactly([TABLE[2], TABLE[0]])


def write_twice(path: Path) -> None:
    """A file of one row that names `answer` twice."""
    if path.suffix == ".parquet":
        columns = [pyarrow.array(["Hi"]), pyarrow.array(["secret one"]), pyarrow.array(["secret two"])]
        parquet.write_table(pyarrow.table(columns, names=["instruction", "answer", "answer"]), path)
        return
    row = '{"instruction": "Hi", "answer": "secret one", "answer": "secret two"}'
    contents = {
        "a.csv": "instruction,answer,answer\nHi,secret one,secret two\n",
        "a.json": f"[{row}]",
        "a.jsonl": row,
        "nested.jsonl": f'{{"turns": [{row}]}}',
        "columns.json": '{"instruction": ["Hi"], "answer": ["secret one"], "answer": ["secret two"]}',
    }
    path.write_text(contents[path.name])


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "nested.jsonl", "columns.json", "a.parquet"])
def test_a_column_that_is_named_twice_is_refused(tmp_path: Path, name: str) -> None:
    write_twice(tmp_path / name)
    with pytest.raises(InvalidArgument, match=r"^--f=.*answer is named twice") as caught:
        read_rows(tmp_path / name, "--f")
    assert "secret" not in str(caught.value)


def test_a_key_that_is_named_twice_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 1, "a": 2}\n')
    with pytest.raises(InvalidArgument, match="line 2: a is named twice"):
        read_rows(tmp_path / "a.jsonl", "--f")


def test_a_field_that_a_parquet_struct_names_twice_is_refused(tmp_path: Path) -> None:
    turns = pyarrow.StructArray.from_arrays([pyarrow.array(["secret"]), pyarrow.array(["b"])], names=["who", "who"])
    parquet.write_table(pyarrow.table({"turn": turns}), tmp_path / "a.parquet")
    with pytest.raises(InvalidArgument, match=r"^--f=.*who is named twice"):
        read_rows(tmp_path / "a.parquet", "--f")


def test_instructions_with_a_key_twice_are_refused_whatever_the_file_is_called(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('[{"instruction": "Hi", "instruction": "Bye"}]')
    with pytest.raises(InvalidArgument, match="instruction is named twice"):
        read_instructions(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("header", ["instruction,,answer", ",instruction,answer", "instruction, ,answer"])
def test_a_csv_column_without_a_name_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\na,b,c\n")
    with pytest.raises(InvalidArgument, match=r"column [12] of the header has no name"):
        read_rows(tmp_path / "a.csv", "--f")


@pytest.mark.parametrize("value", [DEEP, LONG])
def test_json_that_python_does_not_take_is_refused_by_line(value: str, tmp_path: Path) -> None:
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"instruction": "a"}\n{"instruction": ' + value + "}\n")
    whole.write_text('[{"instruction": ' + value + "}]")
    with pytest.raises(InvalidArgument, match=r"line 2 is not JSON \(a number of thousands of digits, or nested"):
        read_rows(lines, "--file")
    with pytest.raises(InvalidArgument, match="not JSON at line 1"):
        read_rows(whole, "--file")
    with pytest.raises(InvalidArgument, match="neither a JSON list nor one JSON object per line"):
        read_instructions(str(whole), "json")


@pytest.mark.parametrize(
    ("name", "good", "bad", "told"),
    [
        ("a.jsonl", '{"a": "1"}\n', "not JSON\n", "line 5001 is not JSON"),
        ("a.csv", "1\n", "1,2\n", "line 5001 has more values"),
    ],
)
def test_a_line_is_read_when_its_turn_comes(tmp_path: Path, name: str, good: str, bad: str, told: str) -> None:
    header = "a\n" if name == "a.csv" else ""
    (tmp_path / name).write_text(header + good * (5000 - len(header) // 2) + bad)
    rows: Iterator[object] = stream_rows(tmp_path / name, "--f")
    assert len(list(islice(rows, 4000))) == 4000
    with pytest.raises(InvalidArgument, match=told):
        list(rows)


def test_long_csv_values_are_read_and_the_limit_is_never_left_changed(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("a\n" + f"{'b' * 2 * before}\n" * 2)
    first, second = (stream_rows(tmp_path / "a.csv", "--f") for _ in range(2))
    assert len(str(next(first)["a"])) == 2 * before
    assert csv.field_size_limit() == before
    assert len(list(second)) == 2
    assert len(list(first)) == 1


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.csv", b"a\n\xff\n", "not UTF-8"),
        ("a.csv", b'a\n"secret\n', "not CSV near line"),
        ("a.parquet", b"secret", "not a Parquet file"),
        ("a.parquet", b"", "is empty"),
        (
            "a.txt",
            b"secret",
            r"unknown kind of file; give \.json, \.jsonl, \.csv, \.tsv \(or with \.gz or \.zst\), or \.parq",
        ),
        ("a.json", b"{", "not JSON"),
        ("a.jsonl", b"", "empty"),
        ("a.csv", b"a,b\n", "empty"),
        ("a.tsv", b"a\tb\n1\t2\t3\n", "line 2 has more values than the header; quote values with tabs"),
        ("a.csv", b"a;b\n1;2,3\n", "its header has ; between the columns; save it with commas"),
        ("a.tsv", b'a\n"secret\n', "not TSV near line"),
        ("a.jsonl.gz", b'{"a": "secret"}\n', "cannot be read"),
        ("a.csv.zst", b"a\nsecret\n", "cannot be read"),
        ("a.json", b"[]", "empty"),
    ],
)
def test_damage_is_refused_and_not_shown(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=told) as caught:
        read_rows(tmp_path / name, "--f")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"--f=.*no such file"):
        list(stream_rows(tmp_path / "a.jsonl", "--f"))


def test_a_file_with_damaged_pages_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "damaged.parquet"
    parquet.write_table(pyarrow.table({"text": [f"{number} of many words" for number in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"^--f=.*damaged\.parquet.*create it again"):
        list(stream_rows(path, "--f"))


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_a_split_for_validation_is_found_and_read(tmp_path: Path, name: str) -> None:
    rows = {split: datasets.Dataset.from_list([{"text": split}]) for split in ("train", name)}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "d"))
    assert has_validation_split(tmp_path / "d", "--f") == (name != "test")
    if name != "test":
        assert read_rows(tmp_path / "d", "--f", "validation") == [{"text": name}]
        return
    with pytest.raises(InvalidArgument, match=r"has no split validation or val \(it has train, test\)"):
        read_rows(tmp_path / "d", "--f", "validation")


def test_a_saved_data_set_without_splits_or_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "one"))
    assert read_rows(tmp_path / "one", "--f") == [{"text": "a"}]
    assert not has_validation_split(tmp_path / "one", "--f")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "none"))
    (tmp_path / "plain").mkdir()
    for folder in ("none", "plain"):
        with pytest.raises(InvalidArgument, match=r"^--f=.*not a readable|^--f=.*empty"):
            read_rows(tmp_path / folder, "--f")


def test_names_that_may_be_records_are_not_shown() -> None:
    assert show_columns(["instruction", "Jane Roe has measles", "x" * 41, 7]) == (
        "instruction, (name not shown), (name not shown), (name not shown)"
    )
    assert show_columns([]) == "none"
