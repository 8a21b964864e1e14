"""A user's own rows: formats, labels of all kinds, random subsets, and errors that show no text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dptune._validate import InvalidArgument
from tests.classification_files import write_rows
from utils.classification.labelled_texts import LabelledTexts, NamedTexts, read_named_texts, read_texts

ROWS = [{"a": f"one {i}", "b": f"two {i}", "y": i % 3} for i in range(6)]


def read(path: Path, columns: tuple[str, ...] = ("a",), label: str = "y", split: str = "train") -> NamedTexts:
    return read_named_texts(path, flag="--train_file", split=split, text_columns=columns, label_column=label)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "folder"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    named = read(write_rows(tmp_path / name, ROWS), ("b", "a"))
    assert named.texts == ([row["b"] for row in ROWS], [row["a"] for row in ROWS])
    assert named.class_names() == ("0", "1", "2")
    rows = named.numbered(named.class_names())
    assert rows.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert rows.labels.dtype == np.int64
    assert (len(rows), rows.num_skipped) == (6, 0)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["spam", "ham", "spam"], ("ham", "spam")),
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", 9, "9"], ("9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([True, False, True], ("False", "True")),
        ([" a", "a ", "b"], ("a", "b")),
    ],
)
def test_classes_are_the_labels_in_order(tmp_path: Path, labels: list[Any], names: tuple[str, ...]) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"a": "x", "y": label} for label in labels])
    named = read(path)
    assert named.class_names() == names
    assert [names[i] for i in named.numbered(names).labels] == [str(label).strip() for label in labels]


def test_a_label_of_no_class_is_refused_by_row_without_its_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"a": "x", "y": "ham"}, {"a": "secret", "y": "hidden"}])
    with pytest.raises(InvalidArgument, match=r"--train_file=.*row 2 .*not one of the training file's") as caught:
        read(path).numbered(("ham", "spam"))
    assert "hidden" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"a": 3, "y": 0}, r"row 2 .*a is not text \(int\)"),
        ({"a": None, "y": 0}, r"row 2 .*a is not text \(no value\)"),
        ({"y": 0}, r"row 2 .*a is missing"),
        ({"a": "secret"}, r"row 2 .*y is missing"),
        ({"a": "secret", "y": None}, r"row 2 .*y holds neither text nor a number; give every row a label"),
        ({"a": "secret", "y": 0.5}, r"row 2 .*not a whole number; give every row a label, not a score"),
        ({"a": "secret", "y": "0.5"}, r"row 2 .*not a whole number; give every row a label, not a score"),
        ({"a": "secret", "y": "1e-3"}, r"row 2 .*not a whole number"),
        ({"a": "secret", "y": "inf"}, r"row 2 .*not a whole number"),
        ({"a": "secret", "y": "  "}, r"row 2 .*neither text nor a number"),
        ({"a": "secret", "y": "NaN"}, r"row 2 .*neither text nor a number"),
        ({"a": "secret", "y": ["secret"]}, r"row 2 .*neither text nor a number"),
        ({"a": "secret", "y": "secret" * 20}, r"row 2 .*over 100 characters"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_number(tmp_path: Path, row: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--train_file=" + ".*" + error) as caught:
        read(write_rows(tmp_path / "d.jsonl", [{"a": "x", "y": 0}, row]))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.csv", ROWS)
    with pytest.raises(InvalidArgument, match=r"--text_columns='c': no such column in .*which has a, b, y"):
        read(path, ("a", "c"))
    with pytest.raises(InvalidArgument, match=r"--label_column='z': no such column"):
        read(path, label="z")
    for columns in ((), ("a", "b", "y")):
        with pytest.raises(InvalidArgument, match=r"--text_columns=.*one column, or two"):
            read(path, columns)


def test_texts_to_classify_need_no_labels(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"a": "first", "b": "one"}, {"a": "second", "b": "two"}])
    assert read_texts(path, flag="--input_file", text_columns=["b", "a"]) == (["one", "two"], ["first", "second"])
    with pytest.raises(InvalidArgument, match=r"--text_columns='c': no such column in .*, which has a, b"):
        read_texts(path, flag="--input_file", text_columns=["c"])
    with pytest.raises(InvalidArgument, match=r"--text_columns=\['a', 'b', 'a'\]: name one column, or two"):
        read_texts(path, flag="--input_file", text_columns=["a", "b", "a"])
    path.write_text('{"a": "first"}\n{"a": 2}\n')
    with pytest.raises(InvalidArgument, match=r"row 2 \(counted from 1\): a is not text \(int\)"):
        read_texts(path, flag="--input_file", text_columns=["a"])


def test_a_column_is_not_a_pair_of_itself(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"a": "x", "y": 0}])
    with pytest.raises(InvalidArgument, match=r"--text_columns=\['a', 'a'\]: names one column twice"):
        read_texts(path, flag="--input_file", text_columns=["a", "a"])


def test_one_class_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="all rows have the same label"):
        read(write_rows(tmp_path / "d.jsonl", [{"a": "x", "y": 0}] * 3)).class_names()


@pytest.mark.parametrize("labels", [["1", "1e0", "2"], ["1", "01", "x"]])
def test_one_number_in_two_spellings_is_refused(tmp_path: Path, labels: list[str]) -> None:
    path = write_rows(tmp_path / "d.csv", [{"a": "x", "y": label} for label in labels])
    with pytest.raises(InvalidArgument, match=r"--train_file=.*d\.csv.*one number in two ways"):
        read(path).class_names()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([1.0, 0.5, 0.0], None),
        ([1.0, None, 0.0], None),
        ([1, -1, 0], "no label; drop those rows, or, if it is a class, list all classes with --class_names"),
        ([1, -1, 1], ("-1", "1")),
    ],
)
def test_numbers_and_missing_labels_are_treated_alike_in_every_format(
    tmp_path: Path, suffix: str, labels: list[Any], names: tuple[str, ...] | str | None
) -> None:
    path = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist([{"a": "x", "y": label} for label in labels]), path)
    else:
        write_rows(path, [{"a": "x", "y": label} for label in labels])
    if isinstance(names, tuple):
        named = read(path)
        assert (list(named.class_names()), len(named.numbered(names))) == (sorted(names, key=float), 3)
    else:
        with pytest.raises(InvalidArgument, match=names or "row 2 .*give every row a label"):
            read(path).class_names()
    if isinstance(names, str):
        assert read(path).numbered(("-1", "0", "1")).labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("whole", [True, False])
def test_a_saved_data_set_keeps_the_names_of_its_classes(tmp_path: Path, whole: bool) -> None:
    """In their order, and those that no row has too."""
    features = datasets.Features({"a": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "maybe", "ja"])})

    def save(labels: list[int]) -> Path:
        saved = datasets.Dataset.from_dict({"a": ["x"] * len(labels), "y": labels}, features=features)
        folder = tmp_path / str(len(labels))
        (saved if whole else datasets.DatasetDict({"train": saved})).save_to_disk(folder)
        return folder

    named = read(save([2, 0]))
    assert named.class_names() == ("no", "maybe", "ja")
    assert named.numbered(named.class_names()).labels.tolist() == [2, 0]
    assert named.numbered(("ja", "no")).labels.tolist() == [0, 1]
    with pytest.raises(InvalidArgument, match=r"row 3 .*y is not a declared class"):
        read(save([2, 0, -1]))


def test_classes_are_taken_from_so_many_labels_only(tmp_path: Path) -> None:
    """A column of ages, say, tells of single rows."""
    rows = [{"a": "x", "y": 1000 + number} for number in range(101)]
    assert len(read(write_rows(tmp_path / "d.jsonl", rows[1:])).class_names()) == 100
    named = read(write_rows(tmp_path / "d.jsonl", rows))
    with pytest.raises(InvalidArgument, match=r"more than 100 different labels, .* with --class_names$") as caught:
        named.class_names()
    assert "1050" not in str(caught.value)
    assert named.numbered([str(1000 + number) for number in range(101)]).labels.tolist() == list(range(101))


def many(count: int) -> LabelledTexts:
    texts = [str(i) for i in range(count)]
    return LabelledTexts((texts, [f"b{t}" for t in texts]), np.arange(count), num_skipped=4)


def test_a_sample_keeps_whole_rows_in_order_once_each() -> None:
    rows = many(50).sample(20, seed=3)
    numbers = rows.labels.tolist()
    assert numbers == sorted(set(numbers))
    assert len(rows) == 20
    assert rows.texts == ([str(i) for i in numbers], [f"b{i}" for i in numbers])
    assert rows.num_skipped == 4
    assert many(50).sample(20, seed=3).texts == rows.texts
    assert many(50).sample(20, seed=4).texts != rows.texts


def test_a_sample_of_all_or_of_none_given_is_everything() -> None:
    assert many(5).sample(None, seed=0).texts == many(5).sample(5, seed=0).texts == many(5).texts


def test_every_row_is_as_likely_to_be_kept() -> None:
    """Of 10 rows 3 are kept, 2,000 times: each 600 times in expectation, give or take 20.5 (one standard deviation)."""
    kept = Counter(int(row) for seed in range(2000) for row in many(10).sample(3, seed).labels)
    assert sum(kept.values()) == 6000
    assert all(abs(kept[row] - 600) < 5 * 20.5 for row in range(10))


def test_the_choice_of_rows_does_not_look_at_them() -> None:
    same = LabelledTexts((["same"] * 50, [""] * 50), np.arange(50)).sample(20, seed=3)
    assert same.labels.tolist() == many(50).sample(20, seed=3).labels.tolist()


@pytest.mark.parametrize("count", [0, -1, 6])
def test_impossible_samples_are_refused(count: int) -> None:
    with pytest.raises(InvalidArgument, match=f"--max_train_examples={count}: "):
        many(5).sample(count, seed=0)
