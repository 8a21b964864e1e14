"""A saved DatasetDict: whole, named as it must be, and read by the trainer's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dptune._validate import InvalidArgument
from scripts import split_dataset
from utils.files.jsonl import write_jsonl
from utils.files.tables import has_validation_split, read_rows


def make_input(tmp_path: Path, count: int = 120, **more: Any) -> list[dict[str, Any]]:
    rows = [
        {"id": f"syn-{i}", "instruction": f"do {i}", "answer": f"done {i}", "bucket": i, **more} for i in range(count)
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    return rows


def split(tmp_path: Path, *more: str, name: str = "labelled_x") -> Path:
    folder = tmp_path / "data" / name
    split_dataset.main(["--input_file", str(tmp_path / "in.jsonl"), "--output_dir", str(folder), *more])
    return folder


def test_the_splits_are_saved_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_input(tmp_path)
    folder = split(tmp_path, "--val_share", "0.2", "--test_share", "0.1")
    saved = datasets.load_from_disk(str(folder))
    assert list(saved) == ["train", "val", "test"]
    assert all(side.column_names == ["instruction", "answer", "id"] for side in saved.values())
    together = sorted((row for side in saved.values() for row in side), key=lambda row: int(row["id"][4:]))
    assert together == [{name: row[name] for name in ("instruction", "answer", "id")} for row in rows]
    assert has_validation_split(folder, "--train_file")
    assert len(read_rows(folder, "--train_file")) == len(saved["train"]) > 60
    told = f"{len(saved['train'])} train, {len(saved['val'])} val, {len(saved['test'])} test"
    assert capsys.readouterr().out == f"{folder}: {told}\n"
    assert [path.name for path in folder.parent.iterdir()] == ["labelled_x"]


def test_the_same_line_again_does_nothing_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_input(tmp_path)
    folder = split(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    split(tmp_path)
    assert capsys.readouterr().out.endswith(f"{folder}: already there\n")
    with pytest.raises(InvalidArgument, match="other rows or settings"):
        split(tmp_path, "--seed", "1")
    make_input(tmp_path, 121)
    with pytest.raises(InvalidArgument, match="other rows or settings"):
        split(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_that_is_somebody_elses_stays(tmp_path: Path) -> None:
    make_input(tmp_path)
    (tmp_path / "data" / "labelled_x").mkdir(parents=True)
    with pytest.raises(InvalidArgument, match="not from this script"):
        split(tmp_path)
    assert list((tmp_path / "data" / "labelled_x").iterdir()) == []


@pytest.mark.parametrize("name", ["synthetic", "my_labelled", "Labelled_x", "labelled_x/.."])
def test_a_name_that_does_not_say_what_it_is_is_refused(tmp_path: Path, name: str) -> None:
    make_input(tmp_path)
    with pytest.raises(InvalidArgument, match="must begin with labelled"):
        split(tmp_path, name=name)
    assert not (tmp_path / "data").exists()


def test_a_crash_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_input(tmp_path)
    real = datasets.Dataset.save_to_disk

    def failing(self: datasets.Dataset, path: str, **kwargs: Any) -> None:
        real(self, path, **kwargs)
        if path.endswith("val"):
            raise RuntimeError("halfway")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "save_to_disk", failing)
        with pytest.raises(RuntimeError, match="halfway"):
            split(tmp_path)
    assert not (tmp_path / "data" / "labelled_x").exists()
    split(tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["labelled_x"]


def test_users_go_along_and_stay_together(tmp_path: Path) -> None:
    rows = [{"instruction": "same", "answer": str(i), "who": [f"u{i % 30} ", None][i % 31 == 0]} for i in range(300)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    saved = datasets.load_from_disk(str(split(tmp_path, "--user_column", "who", "--val_share", "0.3")))
    assert saved["train"].column_names == ["instruction", "answer", "user"]
    users = [set(side["user"]) - {None} for side in saved.values()]
    assert sum(map(len, users)) == 30


def test_ids_are_kept_only_where_every_row_has_one(tmp_path: Path) -> None:
    rows = make_input(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [*rows, {"instruction": "x", "answer": "y"}])
    assert datasets.load_from_disk(str(split(tmp_path)))["train"].column_names == ["instruction", "answer"]


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ([{"instruction": "a"}], [], r"answer is missing \(scripts/annotate"),
        ([{"text": "a"}], [], "instruction is missing"),
        ([{"instruction": "a", "answer": "b"}, {"instruction": "secret"}], [], "row 2 .*answer is missing"),
        ([{"instruction": "a", "answer": None}], [], "answer is not text"),
        ([{"instruction": "a", "answer": "b", "input": "secret"}], [], "row 1 .*input would be left out; join it"),
        ([{"instruction": "a", "answer": "b"}], [], r"^--val_share=0\.05: no row of 1 is in val;"),
        ([{"instruction": "a", "answer": "b"}], ["--user_column", "who"], "--user_column='who': no such column"),
        (
            [{"instruction": "a", "answer": "b", "who": ["secret"]}],
            ["--user_column", "who"],
            "neither text nor a number",
        ),
        ([{"instruction": "a", "answer": "b"}], ["--test_share", "1"], "--test_share=1.0"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, rows: list[Any], more: list[str], told: str) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidArgument, match=told) as caught:
        split(tmp_path, *more)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "data" / "labelled_x").exists()


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_damaged_note_is_one_line(content: str, tmp_path: Path) -> None:
    make_input(tmp_path)
    (split(tmp_path) / "split.json").write_text(content)
    with pytest.raises(InvalidArgument, match=r"its split\.json is damaged; remove the folder"):
        split(tmp_path)


def test_users_are_not_left_out_without_a_word(tmp_path: Path) -> None:
    make_input(tmp_path, user_id="ann")
    with pytest.raises(InvalidArgument, match="names users in user_id; give --user_column user_id"):
        split(tmp_path)
    with pytest.raises(InvalidArgument, match=r"^--ignore_users=True"):
        split(tmp_path, "--user_column", "user_id", "--ignore_users")
    assert not (tmp_path / "data").exists()
    assert datasets.load_from_disk(str(split(tmp_path, "--ignore_users")))["train"].column_names[-1] == "id"


def test_half_a_character_in_a_users_name_is_refused_by_row(tmp_path: Path) -> None:
    make_input(tmp_path, who="x")
    text = (tmp_path / "in.jsonl").read_text().splitlines()
    text[6] = text[6].replace('"x"', '"Jane \\ud800"')
    (tmp_path / "in.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(InvalidArgument, match="surrogate") as error:
        split(tmp_path, "--user_column", "who")
    assert "Jane" not in str(error.value)
    assert "7" in str(error.value)
