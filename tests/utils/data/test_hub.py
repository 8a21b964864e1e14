"""A folder in the hub's layout as the hub's data set: split by split, as a stream, with one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dptune._validate import InvalidArgument
from tests.utils.data.test_load import load, pair, text, write_jsonl
from utils.data.hub import HubRows
from utils.data.sources import numbered

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
- config_name: small
  data_files:
  - split: train
    path: small/*
---
"""


def write(path: Path, *answers: str | float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": "Say it.", "answer": answer} for answer in answers]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a data set of two shards and a validation split. Any cache would be in `tmp_path/cache`."""
    for place in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, place, tmp_path / "cache")
    folder = tmp_path / "org" / "name"
    write(folder / "data" / "train-00001-of-00002.parquet", "c")
    write(folder / "data" / "train-00000-of-00002.parquet", "a", "b")
    write(folder / "data" / "validation-00000-of-00001.parquet", "v")
    write(folder / "small" / "0.parquet", "s")
    (folder / "README.md").write_text(CARD)
    return str(folder)


def test_the_same_rows_as_from_files_and_no_copy(name: str, tmp_path: Path) -> None:
    train, held_out = load(dataset_name=name)
    assert held_out is not None
    assert [text(train, row) for row in range(3)] == [f"Say it.\n{answer}</s>" for answer in "abc"]
    assert (len(held_out), text(held_out)) == (1, "Say it.\nv</s>")
    files, _ = load(train_file=write_jsonl(tmp_path / "t.jsonl", *map(pair, "abc")))
    assert train.fingerprint() == files.fingerprint()
    assert not (tmp_path / "cache").exists()


def test_configuration_split_and_a_validation_file_are_chosen(name: str, tmp_path: Path) -> None:
    small, none = load(dataset_name=name, dataset_config="small")
    assert (text(small), none) == ("Say it.\ns</s>", None)
    swapped, none = load(dataset_name=name, dataset_split="validation")
    assert (text(swapped), none) == ("Say it.\nv</s>", None)
    _, given = load(dataset_name=name, validation_file=write_jsonl(tmp_path / "v.jsonl", pair("mine")))
    assert given is not None
    assert text(given) == "Say it.\nmine</s>"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dataset_config": "large"}, "--dataset_config='large': .*org/name has default, small; give one of them"),
        ({"dataset_split": "test"}, "--dataset_split='test': .*has the splits train, validation; give one of them"),
        (
            {"dataset_name": "./nobody/nothing"},
            r"--dataset_name='./nobody/nothing': cannot be read \(\w+\); check the name",
        ),
        ({"dataset_name": "pubmed_generation", "dataset_split": "train"}, "--dataset_split='train': belongs to"),
        (
            {"dataset_name": "pubmed_generation", "dataset_config": "x"},
            "--dataset_config='x': belongs to a --dataset_name",
        ),
    ],
)
def test_mistakes_are_told_with_what_there_is(name: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        load(**{"dataset_name": name} | change)


def test_a_bad_row_is_named_and_a_damaged_file_quotes_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    shard = Path(name) / "data" / "train-00001-of-00002.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "secret", "answer": None}]), shard)
    with pytest.raises(
        InvalidArgument, match=r"--dataset_name='.*org/name': row 3 \(counted from 1\): answer is not text"
    ):
        load(dataset_name=name)
    shard.write_bytes(b"secret")
    with pytest.raises(InvalidArgument, match=r"--dataset_name='.*org/name': cannot be read \(Arrow\w+\)"):
        load(dataset_name=name)
    assert "secret" not in "".join(capfd.readouterr())


def test_people_are_found_in_a_data_set_of_the_hub(name: str) -> None:
    shard = Path(name) / "small" / "0.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([pair("a") | {"user_id": "7"}]), shard)
    with pytest.raises(InvalidArgument, match="names users in user_id; give --privacy_unit user_id"):
        load(dataset_name=name, dataset_config="small", users_flag="--privacy_unit")


def test_the_state_tells_a_change_of_any_file(name: str) -> None:
    states = [HubRows(name).state(), HubRows(name, "small").state(), HubRows(name, split="validation").state()]
    write(Path(name) / "data" / "train-00001-of-00002.parquet", "c", "d")
    states.append(HubRows(name).state())
    assert len({json.dumps(state) for state in states}) == 4


def test_numbers_that_are_none_are_none_here_too(name: str) -> None:
    write(Path(name) / "small" / "0.parquet", float("nan"), 1.5)
    assert [row["answer"] for _, row in numbered(HubRows(name, "small"))] == [None, 1.5]
