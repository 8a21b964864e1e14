"""The function that the training script calls: which data, which validation set, and the shipped example file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dptune._validate import InvalidArgument
from tests.tiny import tiny_tokenizer
from utils.data.load import load_training_data
from utils.data.named_sets import DATA_DIR
from utils.data.tokenization import TokenizedDataset

TOKENIZER = tiny_tokenizer()


def load(**given: Any) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """`load_training_data` with these arguments and no others."""
    settings: dict[str, Any] = {
        "dataset_name": None,
        "train_file": None,
        "validation_file": None,
        "prompt_style": "plain",
        "tokenizer": TOKENIZER,
        "block_size": 64,
    }
    return load_training_data(**{**settings, **given})


def write_jsonl(path: Path, *rows: dict[str, str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(answer: str) -> dict[str, str]:
    return {"instruction": "Say it.", "answer": answer}


def text(data: TokenizedDataset, index: int = 0) -> str:
    return TOKENIZER.decode(data.batch([index], 0)["input_ids"][0])


def test_file_with_and_without_validation_file(tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "t.jsonl", pair("yes"), pair("no"))
    train, validation = load(train_file=train_file)
    assert (len(train), text(train), validation) == (2, "Say it.\nyes</s>", None)
    _, validation = load(train_file=train_file, validation_file=write_jsonl(tmp_path / "v.jsonl", pair("maybe")))
    assert validation is not None
    assert (len(validation), text(validation)) == (1, "Say it.\nmaybe</s>")


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_saved_dataset_brings_its_own_validation_split(tmp_path: Path, name: str) -> None:
    splits = {"train": [pair("yes")], name: [pair("no"), pair("so")], "test": [pair("x")]}
    folder = str(tmp_path / "saved")
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder)
    train, validation = load(train_file=folder)
    assert validation is not None
    assert (text(train), len(validation), text(validation)) == ("Say it.\nyes</s>", 2, "Say it.\nno</s>")
    _, validation = load(train_file=folder, validation_file=write_jsonl(tmp_path / "v.jsonl", pair("maybe")))
    assert validation is not None
    assert text(validation) == "Say it.\nmaybe</s>"


def test_an_error_in_the_validation_file_names_its_flag(tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "t.jsonl", pair("yes"))
    with pytest.raises(InvalidArgument, match=r"--validation_file=.*no such file"):
        load(train_file=train_file, validation_file=str(tmp_path / "none.jsonl"))


def test_users_that_nobody_thought_of_are_refused_in_the_training_file_alone(tmp_path: Path) -> None:
    with_users = write_jsonl(tmp_path / "t.jsonl", pair("yes"), pair("no") | {"email": "ann@example.org"})
    told = "--train_file=.*names users in email; give --privacy_unit email, or --ignore_users"
    with pytest.raises(InvalidArgument, match=told) as caught:
        load(train_file=with_users, users_flag="--privacy_unit")
    assert "ann@" not in str(caught.value)
    assert len(load(train_file=with_users)[0]) == 2
    plain = write_jsonl(tmp_path / "p.jsonl", pair("yes"))
    assert load(train_file=plain, validation_file=with_users, users_flag="--privacy_unit")[1] is not None


@pytest.mark.parametrize("given", [{}, {"dataset_name": "pubmed_generation", "train_file": "x.json"}])
def test_exactly_one_source(given: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="exactly one of --train_file and --dataset_name"):
        load(**given)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InvalidArgument, match=r"--dataset_name='wikitext': give one of pubmed_generation"):
        load(dataset_name="wikitext")


def test_pubmed_is_abstracts_after_their_prompt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pubmed" / "a.jsonl", {"abstract": "The patients"}, {"abstract": "We report"})
    train, validation = load(dataset_name="pubmed_generation", data_dir=tmp_path)
    assert [text(train, i) for i in range(2)] == ["Abstract: The patients</s>", "Abstract: We report</s>"]
    labels = train.batch([0], 0)["labels"][0]
    assert TOKENIZER.decode(labels[labels != -100]) == " The patients</s>"
    assert validation is None
    write_jsonl(tmp_path / "pubmed" / "validation.jsonl", {"abstract": "A disease"})
    train, validation = load(dataset_name="pubmed_generation", data_dir=tmp_path)
    assert validation is not None
    assert (len(train), len(validation), text(validation)) == (2, 1, "Abstract: A disease</s>")


def test_pubmed_dates_are_passed_on(tmp_path: Path) -> None:
    rows = [{"abstract": f"Day {day}", "date": f"2024-01-0{day}"} for day in (1, 2, 3)]
    write_jsonl(tmp_path / "pubmed" / "a.jsonl", *rows)
    known = {"dataset_name": "pubmed_generation", "data_dir": tmp_path}
    train, _ = load(**known, date_from="2024-01-02", date_to="2024-01-03")
    assert len(train) == 2
    with pytest.raises(InvalidArgument, match=r"--date_from='2024-13-02': give a day as YYYY-MM-DD"):
        load(**known, date_from="2024-13-02", date_to="2024-12-03")


def test_the_shipped_example_file_loads() -> None:
    train, _ = load(train_file=str(DATA_DIR / "example_instructions.json"), block_size=256)
    assert len(train) == 24
    assert train.num_cut == train.num_without_answer == 0
    assert len({text(train, i) for i in range(24)}) == 24
