"""GLUE's files as they are, with their oddities, and the hub's copy (a stand-in: no test reaches for the hub)."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from dptune._validate import InvalidArgument
from tests.classification_files import LABELS, fields_of, write_task, write_tsv
from utils.classification.glue import GLUE, read_folder, read_hub
from utils.classification.labelled_texts import LabelledTexts

NAMES = ("sst2", "qnli", "qqp", "mnli")


def sst2_of(tmp_path: Path, train: bytes) -> LabelledTexts:
    """What is read of a training file with these bytes."""
    folder = write_task(tmp_path / "sst2", "sst2")
    (folder / "train.tsv").write_bytes(train)
    return read_folder("sst2", tmp_path)["train"]


@pytest.mark.parametrize("name", NAMES)
def test_real_columns_of_every_task(tmp_path: Path, name: str) -> None:
    write_task(tmp_path / GLUE[name].folder, name)
    splits = read_folder(name, tmp_path)
    expected = ["train", "matched", "mismatched"] if name == "mnli" else ["train", "validation"]
    assert list(splits) == expected
    files = ["train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"] if name == "mnli" else ["train.tsv", "dev.tsv"]
    for split, file in zip(expected, files, strict=True):
        rows, count = splits[split], 6 if split == "train" else 4
        num_texts = 1 if name == "sst2" else 2
        assert rows.texts == tuple([f"{file} {i} text {part}" for i in range(count)] for part in range(num_texts))
        assert rows.labels.tolist() == [i % len(LABELS[name]) for i in range(count)]
        assert rows.num_skipped == 0


def test_class_names_are_the_files_labels_in_the_hubs_order() -> None:
    assert {name: GLUE[name].class_names for name in NAMES} == {
        "sst2": ("negative", "positive"),
        "qnli": ("entailment", "not_entailment"),
        "qqp": ("not_duplicate", "duplicate"),
        "mnli": ("entailment", "neutral", "contradiction"),
    }
    assert {name: GLUE[name].metrics for name in NAMES if name != "qqp"} == dict.fromkeys(
        ("sst2", "qnli", "mnli"), ("accuracy",)
    )
    assert GLUE["qqp"].metrics == ("accuracy", "f1")


@pytest.mark.parametrize("folder", ["sst2", "SST-2", "."])
def test_the_task_is_found_under_either_name_or_is_the_folder(tmp_path: Path, folder: str) -> None:
    write_task(tmp_path / folder, "sst2")
    assert len(read_folder("sst2", tmp_path)["train"]) == 6


def test_a_folder_of_ones_own_goes_before_files_beside_it(tmp_path: Path) -> None:
    write_task(tmp_path, "sst2", count=3)
    write_task(tmp_path / "sst2", "sst2", count=5)
    assert len(read_folder("sst2", tmp_path)["train"]) == 5


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^--data_dir=.*train\.tsv.*: label is named twice"):
        sst2_of(tmp_path, b"label\tsentence\tlabel\n0\tsecret\t1\n")


@pytest.mark.parametrize(
    "sentence", ['"', '"a b', 'a "b" c', "a \\ b", " a ", "a, b", "", "#", "NA", "a\x0bb\x85c d\re"]
)
def test_a_quotation_mark_is_a_character_and_nothing_ends_a_line_but_its_end(tmp_path: Path, sentence: str) -> None:
    rows = sst2_of(tmp_path, f"sentence\tlabel\n{sentence}\t1\nb\t0\n".encode())
    assert rows.texts == ([sentence, "b"],)
    assert rows.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "train",
    [
        b"label\tsentence\n1\ta b\n0\tb\n",
        b"label\tcontent\n1\ta b\n0\tb\n",
        b"sentence\tlabel\r\na b\t1\r\nb\t0\r\n",
        b"\xef\xbb\xbfsentence\tlabel\na b\t1\nb\t0",
        b"sentence\tlabel\n\na b\tpositive\nb\tnegative\n\n",
        b"idx\tsentence\tother\tlabel\n0\ta b\tx\t1\n1\tb\tx\t0\n",
    ],
    ids=["order", "other name", "CRLF", "BOM", "blank lines and names", "more columns"],
)
def test_variants_of_a_file_give_the_same_rows(tmp_path: Path, train: bytes) -> None:
    rows = sst2_of(tmp_path, train)
    assert rows.texts == (["a b", "b"],)
    assert rows.labels.tolist() == [1, 0]


def test_broken_lines_of_qqp_are_left_out_and_counted(tmp_path: Path) -> None:
    """GLUE's own training file has a few rows with a line feed in a question, so that neither half has six fields."""
    folder = write_task(tmp_path / "QQP", "qqp")
    broken = [["7", "1", "2", "Why is"], ["this?", "Why?", "1"], [""] * 5, ["x"] * 7]
    rows = [
        fields_of("qqp", ["a", "b"], "1"),
        *broken,
        fields_of("qqp", ["c", "d"], ""),
        fields_of("qqp", ["e", "f"], "0"),
    ]
    write_tsv(folder / "train.tsv", "qqp", rows)
    splits = read_folder("qqp", tmp_path)
    assert splits["train"].texts == (["a", "e"], ["b", "f"])
    assert splits["train"].labels.tolist() == [1, 0]
    assert (splits["train"].num_skipped, splits["validation"].num_skipped) == (5, 0)


def test_rows_of_mnli_without_an_agreed_label_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "mnli", "mnli")
    rows = [fields_of("mnli_dev", ["a", "b"], label) for label in ("neutral", "-", "contradiction", "-")]
    write_tsv(folder / "dev_matched.tsv", "mnli_dev", rows)
    matched = read_folder("mnli", tmp_path)["matched"]
    assert matched.labels.tolist() == [1, 2]
    assert matched.num_skipped == 2


@pytest.mark.parametrize(
    ("train", "error"),
    [
        (b"", r"train\.tsv': no column sentence or content or text \(found "),
        (b"sentence\tlabel\n", r"train\.tsv': has no labelled rows"),
        (b"sentence\tclass\na\t1\n", r"no column label \(found sentence, class\)"),
        (b"a secret text\t1\n", r"no column sentence or content or text \(found \(name not shown\)"),
        (b"sentence\tlabel\na\t1\na secret\n", r"line 3 has 1 fields, the header 2"),
        (b"sentence\tlabel\na secret\t1\t1\n", r"line 2 has 3 fields, the header 2"),
        (b"sentence\tlabel\n\na secret\tsecret\n", r"line 3 has an unknown label; use one of negative, positive"),
        (b"sentence\tlabel\na secret\t2\n", r"line 2 has an unknown label"),
        (b"sentence\tlabel\na secret\t\n", r"line 2 has an unknown label"),
        (b"sentence\tlabel\na secret \xe9\t1\n", r"not UTF-8"),
    ],
)
def test_files_that_cannot_be_right_are_refused_without_showing_text(tmp_path: Path, train: bytes, error: str) -> None:
    with pytest.raises(InvalidArgument, match="^--data_dir='.*" + error) as caught:
        sst2_of(tmp_path, train)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"--data_dir='.*none': no such folder"):
        read_folder("sst2", tmp_path / "none")
    with pytest.raises(InvalidArgument, match=r"has no qnli/train\.tsv and no QNLI/train\.tsv"):
        read_folder("qnli", tmp_path)
    write_task(tmp_path / "qnli", "qnli")
    (tmp_path / "qnli" / "dev.tsv").unlink()
    with pytest.raises(InvalidArgument, match=r"dev\.tsv': no such file"):
        read_folder("qnli", tmp_path)


def test_a_folder_of_another_task_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "qnli")
    with pytest.raises(InvalidArgument, match=r"no column question1 \(found index, question, sentence, label\)"):
        read_folder("qqp", tmp_path)
    with pytest.raises(InvalidArgument, match="line 2 has an unknown label"):  # it has sentences and labels too
        read_folder("sst2", tmp_path)


def hub_tables(name: str) -> datasets.DatasetDict:
    """Splits with the hub's column names and numbered labels; the test split has none."""
    columns = {"sst2": ["sentence"], "qnli": ["question", "sentence"], "qqp": ["question1", "question2"]}
    texts = columns.get(name, ["premise", "hypothesis"])
    features = datasets.Features(
        {
            **dict.fromkeys(texts, datasets.Value("string")),
            "label": datasets.ClassLabel(names=list(GLUE[name].class_names)),
        }
    )
    splits = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]

    def table(split: str, label: int) -> datasets.Dataset:
        rows = [{**{text: f"{split} {text} {i}" for text in texts}, "label": label} for i in range(2)]
        return datasets.Dataset.from_list(rows, features=features)

    return datasets.DatasetDict(
        {"train": table("train", 1), **{s: table(s, 0) for s in splits}, "test": table("t", -1)}
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_copy_gives_the_same_splits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []

    def load_dataset(path: str, config: str) -> datasets.DatasetDict:
        asked.append((path, config))
        return hub_tables(config)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = read_hub(name)
    assert asked == [("nyu-mll/glue", name)]
    assert list(splits) == list(GLUE[name].splits)
    assert splits["train"].labels.tolist() == [1, 1]
    column = {"sst2": "sentence", "qnli": "question", "qqp": "question1", "mnli": "premise"}[name]
    assert splits["train"].texts[0] == [f"train {column} 0", f"train {column} 1"]
    last = list(splits)[-1]
    assert splits[last].texts[0][0].startswith(f"validation{'_mismatched' if name == 'mnli' else ''} ")
    assert splits[last].labels.tolist() == [0, 0]


def test_rows_of_the_hub_without_a_label_are_left_out_where_the_files_have_them_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = hub_tables("mnli")
    tables["train"] = datasets.concatenate_datasets([tables["test"], tables["train"]])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: tables)
    train = read_hub("mnli")["train"]
    assert (len(train), train.num_skipped) == (len(tables["train"]) - len(tables["test"]), len(tables["test"]))
    assert train.labels.tolist() == [1, 1]
    assert [len(column) for column in train.texts] == [len(train)] * 2


def test_the_hubs_former_name_is_tried_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, config: str) -> datasets.DatasetDict:
        if path != "glue":
            raise FileNotFoundError(path)
        return hub_tables(config)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_hub("sst2")["train"]) == 2


def test_a_hub_out_of_reach_is_one_line_that_names_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, _config: str) -> datasets.DatasetDict:
        asked.append(path)
        raise ConnectionError("a long story\nin two lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidArgument) as caught:
        read_hub("mnli")
    assert str(caught.value) == (
        "--datasets='mnli': cannot be loaded from the hub (ConnectionError); "
        "give --data_dir a folder of GLUE's TSV files"
    )
    assert len(asked) == 1  # each try waits for half a minute


def test_a_hub_copy_that_is_not_as_expected_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hub_tables("sst2")
    other_names = datasets.ClassLabel(names=["positive", "negative"])
    wrong = {
        "no split validation": datasets.DatasetDict({"train": whole["train"]}),
        "no column sentence": whole.rename_column("sentence", "review"),
        "rows without a label": datasets.DatasetDict({"train": whole["test"], "validation": whole["validation"]}),
        "other classes": whole.cast_column("label", other_names),
    }
    for error, tables in wrong.items():
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, given=tables: given)
        with pytest.raises(InvalidArgument, match="--datasets='sst2': .*" + error):
            read_hub("sst2")
