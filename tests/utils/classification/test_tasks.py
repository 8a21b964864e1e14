"""The functions that the classification script calls: tasks known by name and a user's files, tokenised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dptune._validate import InvalidArgument
from tests.classification_files import write_rows, write_task
from tests.tiny import tiny_pair_tokenizer
from utils.classification.dataset import ClassificationDataset
from utils.classification.tasks import TASKS, ClassificationTask, describe_task, load_file_task, load_task

TOKENIZER = tiny_pair_tokenizer(["one two 0 1 2 3 4 5 6 7 8 9 text train dev dev_matched dev_mismatched tsv ."])


def load(name: str, **given: Any) -> ClassificationTask:
    return load_task(name, **{"tokenizer": TOKENIZER, "max_length": 32, **given})


def load_file(train: Path, validation: Path | None = None, **given: Any) -> ClassificationTask:
    settings: dict[str, Any] = {"text_columns": ["a"], "label_column": "y", "tokenizer": TOKENIZER, "max_length": 32}
    return load_file_task(str(train), None if validation is None else str(validation), **{**settings, **given})


def text(data: ClassificationDataset, index: int = 0) -> str:
    return TOKENIZER.decode(data.batch([index], 0)["input_ids"][0])


def rows_of(*labels: object) -> list[dict[str, Any]]:
    return [{"a": f"one {i}", "b": f"two {i}", "y": label} for i, label in enumerate(labels)]


def test_the_tasks_are_these() -> None:
    assert TASKS == ("sst2", "qnli", "qqp", "mnli")


def test_a_file_that_names_users_is_refused_where_asked(tmp_path: Path) -> None:
    rows = [row | {"speaker": "Jane Roe"} for row in rows_of(0, 1)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    with pytest.raises(InvalidArgument, match=r"--train_file=.*names users in speaker, but this program") as caught:
        load_file(path, refuse_users=True)
    assert "Jane" not in str(caught.value)
    assert len(load_file(path).train) == 2
    plain = write_rows(tmp_path / "p.jsonl", rows_of(0, 1))
    assert load_file(plain, path, refuse_users=True).validation


@pytest.mark.parametrize(("name", "validation"), [("sst2", "dev"), ("qnli", "dev"), ("qqp", "dev")])
def test_a_task_from_a_folder(tmp_path: Path, name: str, validation: str) -> None:
    write_task(tmp_path / name, name)
    task = load(name, data_dir=str(tmp_path))
    assert task.name == name
    assert (len(task.train), list(task.validation), len(task.validation["validation"])) == (6, ["validation"], 4)
    assert task.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    second = "" if name == "sst2" else "{0}. tsv 3 text 1 [SEP]"
    for data, file in ((task.train, "train"), (task.validation["validation"], validation)):
        whole = f"[CLS] {file} . tsv 3 text 0 [SEP] " + second.format(f"{file} ")
        assert text(data, 3).split() == whole.split()


def test_mnli_is_judged_on_both_of_its_splits(tmp_path: Path) -> None:
    write_task(tmp_path / "MNLI", "mnli", count=8)
    task = load("mnli", data_dir=str(tmp_path))
    assert task.class_names == ("entailment", "neutral", "contradiction")
    assert {split: len(data) for split, data in task.validation.items()} == {"matched": 6, "mismatched": 6}
    assert "dev_matched" in text(task.validation["matched"])
    assert "dev_mismatched" in text(task.validation["mismatched"])


def test_only_training_rows_are_sampled(tmp_path: Path) -> None:
    write_task(tmp_path / "sst2", "sst2", count=10)
    whole = load("sst2", data_dir=str(tmp_path))
    task = load("sst2", data_dir=str(tmp_path), max_train_examples=4, seed=1)
    assert (len(task.train), len(task.validation["validation"])) == (4, 8)
    assert task.validation["validation"].fingerprint() == whole.validation["validation"].fingerprint()
    kept = [[text(whole.train, i) for i in range(10)].index(text(task.train, i)) for i in range(4)]
    assert kept == sorted(kept)
    assert whole.train.subset(kept).fingerprint() == task.train.fingerprint()
    other = load("sst2", data_dir=str(tmp_path), max_train_examples=4, seed=2)
    assert other.train.fingerprint() != task.train.fingerprint()


def test_unknown_tasks_and_a_hub_out_of_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(_path: str, _config: str) -> datasets.DatasetDict:
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidArgument, match=r"--datasets='cola': give one of sst2, qnli, qqp, mnli"):
        load("cola")
    with pytest.raises(InvalidArgument, match=r"--datasets='sst2': .*give --data_dir"):
        load("sst2")


def test_a_file_with_and_without_a_validation_file(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "mails.csv", rows_of("spam", "ham", "spam"))
    task = load_file(train, write_rows(tmp_path / "v.jsonl", rows_of("ham")))
    assert (task.name, task.class_names, task.metrics) == ("mails", ("ham", "spam"), ("accuracy",))
    assert task.train.labels.tolist() == [1, 0, 1]
    assert task.validation["validation"].labels.tolist() == [0]
    assert text(task.train, 2) == "[CLS] one 2 [SEP]"
    assert load_file(train).validation == {}


def test_pairs_are_read_in_the_order_of_the_flag(tmp_path: Path) -> None:
    task = load_file(write_rows(tmp_path / "d.parquet", rows_of(0, 1)), text_columns=["b", "a"])
    assert text(task.train, 1) == "[CLS] two 1 [SEP] one 1 [SEP]"
    assert task.train.token_types is not None
    assert task.train.token_types.tolist() == [0, 0, 0, 0, 1, 1, 1] * 2


def test_a_saved_dataset_brings_its_own_validation_split(tmp_path: Path) -> None:
    splits = {"train": rows_of("ham", "spam"), "validation": rows_of("spam")}
    folder = tmp_path / "saved"
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(folder)
    assert load_file(folder).validation["validation"].labels.tolist() == [1]
    other = load_file(folder, write_rows(tmp_path / "v.jsonl", rows_of("ham", "ham")))
    assert other.validation["validation"].labels.tolist() == [0, 0]


def test_classes_are_those_of_all_training_rows_whichever_are_sampled(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "d.jsonl", rows_of(*["common"] * 20, "rare"))
    tasks = [load_file(train, max_train_examples=2, seed=seed) for seed in range(5)]
    assert {task.class_names for task in tasks} == {("common", "rare")}
    assert {len(task.train) for task in tasks} == {2}
    assert any(not task.train.labels.any() for task in tasks)


def test_an_empty_validation_split_is_refused(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(rows_of("ham", "spam"))}
    splits["validation"] = splits["train"].select([])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        InvalidArgument, match=r"--train_file=.*one of its splits has no rows; add rows or remove the split"
    ):
        load_file(tmp_path / "saved")


def test_class_names_that_are_given_do_not_depend_on_the_rows(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", rows_of("spam", "ham", "spam"))
    task = load_file(train, class_names=["spam", "eggs", "ham"])
    assert task.class_names == ("spam", "eggs", "ham")
    assert task.train.labels.tolist() == [0, 2, 0]
    held_out = write_rows(tmp_path / "v.jsonl", rows_of("ham", "secret"))
    for flag, files in (("--train_file", (held_out,)), ("--validation_file", (train, held_out))):
        with pytest.raises(InvalidArgument, match=rf"^{flag}=.*row 2 .*is not one of --class_names; ") as caught:
            load_file(*files, class_names=["spam", "eggs", "ham"])
        assert "secret" not in str(caught.value)


def test_a_validation_label_that_training_lacks_is_refused_by_row(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", rows_of("ham", "spam"))
    validation = write_rows(tmp_path / "v.jsonl", rows_of("ham", "secret"))
    with pytest.raises(InvalidArgument, match=r"^--validation_file='.*v\.jsonl': row 2 .*training file's") as caught:
        load_file(train, validation)
    assert "secret" not in str(caught.value)


def test_errors_name_the_flag_of_their_file(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "t.jsonl", rows_of("ham", "spam"))
    with pytest.raises(InvalidArgument, match=r"--train_file='.*none\.csv': no such file"):
        load_file(tmp_path / "none.csv")
    with pytest.raises(InvalidArgument, match=r"--validation_file='.*none\.csv': no such file"):
        load_file(train, tmp_path / "none.csv")
    with pytest.raises(InvalidArgument, match=r"--max_train_examples=3: the training set has 2 rows"):
        load_file(train, max_train_examples=3)
    with pytest.raises(InvalidArgument, match=r"--block_size=2: "):
        load_file(train, max_length=2)


def test_what_was_lost_is_told(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "qqp", "qqp")
    with (folder / "train.tsv").open("a") as file:
        file.write("half a row\tof text\n")
    task = load("qqp", data_dir=str(tmp_path), max_length=12)
    assert task.train.num_skipped == 1
    assert task.train.num_cut == len(task.train) == 6
    assert describe_task(task) == [
        "task                   qqp: not_duplicate, duplicate",
        "training               6 examples, 72 tokens",
        "                       6 of them cut to --block_size",
        "                       1 more row left out: damaged or without a label",
        "validation             4 examples, 48 tokens",
        "                       4 of them cut to --block_size",
    ]
    assert np.array_equal(task.train.lengths, np.full(6, 12))
