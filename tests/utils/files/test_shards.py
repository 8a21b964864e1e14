"""Which files the values of a flag name, in which order, and that no row is left out or counted twice."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from dptune._validate import InvalidArgument
from utils.files.shards import find_files, paths_in_words

FLAG = "--train_file"


def make(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_paths_stay_in_their_order_and_globs_and_folders_are_sorted(tmp_path: Path) -> None:
    b, a, ten, two = make(tmp_path, "b.jsonl", "a.jsonl", "sub/10.parquet", "sub/2.parquet")
    make(tmp_path, "sub/_SUCCESS", "sub/.hidden", "sub/README.md")
    assert find_files([str(b), str(a)], FLAG) == [b, a]
    assert find_files(str(tmp_path / "*.jsonl"), FLAG) == [a, b]
    assert find_files([str(tmp_path / "sub"), str(a)], FLAG) == [ten, two, a]
    assert find_files(str(tmp_path / "**" / "*.parquet"), FLAG) == [ten, two]
    assert find_files("nowhere.jsonl", FLAG) == [Path("nowhere.jsonl")]  # its reader says that it is missing


def test_a_path_with_the_signs_of_a_glob_is_a_path_if_it_is_there(tmp_path: Path) -> None:
    (odd, _) = make(tmp_path, "rows[1].jsonl", "rows1.jsonl")
    assert find_files(str(odd), FLAG) == [odd]


def test_a_saved_data_set_is_one_path(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"a": 1}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "many"))
    for name in ("one", "many"):
        assert find_files(str(tmp_path / name), FLAG) == [tmp_path / name]


@pytest.mark.parametrize(
    ("names", "given", "told"),
    [
        (["a.jsonl"], ["a.jsonl", "*.jsonl"], "a.jsonl'.*is named twice, so its rows would count twice"),
        (["a.jsonl"], ["a.jsonl", "../{here}/a.jsonl"], "is named twice"),
        (["a.jsonl"], ["*.csv"], "no file matches; check the pattern"),
        (["f/a.jsonl", "f/a.parquet"], ["f"], "holds .jsonl and .parquet files; give a folder of one kind"),
        (["f/a.jsonl", "f/b.jsonl.gz"], ["f"], "holds .jsonl and .jsonl.gz files"),
        (["f/a.jsonl", "f/sub/b.jsonl"], ["f"], "holds sub, which is not .json"),
        (["f/_SUCCESS"], ["f"], "holds no files of rows"),
    ],
)
def test_what_would_lose_rows_or_count_them_twice_is_refused(
    tmp_path: Path, names: list[str], given: list[str], told: str
) -> None:
    make(tmp_path, *names)
    values = [str(tmp_path / value.format(here=tmp_path.name)) for value in given]
    with pytest.raises(InvalidArgument, match=f"--train_file=.*{told}"):
        find_files(values, FLAG)


def test_no_value_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="give at least one file"):
        find_files([], FLAG)


def test_values_are_shown_as_in_a_command_line() -> None:
    assert [paths_in_words(one) for one in (None, "a", Path("b"), ["a", Path("b")])] == [None, "a", "b", "a b"]
