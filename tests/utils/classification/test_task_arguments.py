"""Flags of the data: GLUE tasks or a file, and the columns of the file."""

from __future__ import annotations

import pytest

from dptune import InvalidArgument
from tests.classifier_settings import settings


def test_labels_are_in_the_column_label_unless_another_is_named() -> None:
    own = ("--train_file", "x", "--text_columns", "t")
    assert settings(datasets=own).data.labels_in == "label"
    assert settings("--label_column", "mood", datasets=own).data.labels_in == "mood"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train_file", "x.csv", "--text_columns", "text"), "--datasets='sst2': give either this or"),
        (("--label_column", "label"), "--label_column='label': works only with --train_file"),
        (("--text_columns", "text"), r"--text_columns=\['text'\]: works only with --train_file"),
        (("--max_train_examples", "0"), "--max_train_examples=0: give a whole number"),
    ],
)
def test_a_mistake_names_the_flag(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--datasets=None: give either this or --train_file"),
        (("--datasets", "sst2", "sst2"), "--datasets='sst2 sst2': names a task twice"),
        (("--train_file", "x.csv"), "--text_columns=None: --train_file needs it"),
        (("--train_file", "x", "--text_columns", "t", "--data_dir", "d"), "--data_dir='d': works only with --datasets"),
        (("--train_file", "x", "--text_columns", "label"), "--label_column='label': is one of --text_columns"),
        (("--train_file", "x", "--text_columns", "t", "--class_names", "a"), "--class_names='a': give two or more"),
        (("--train_file", "x", "--text_columns", "t", "--class_names", "a", "a"), "--class_names='a a': give two"),
        (("--train_file", "x", "--text_columns", "t", "--class_names", "a", " b"), "--class_names='a  b': give two"),
        (("--datasets", "sst2", "--class_names", "a", "b"), r"--class_names=\['a', 'b'\]: works only with --train"),
    ],
)
def test_mistakes_about_the_data(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        settings(*flags, datasets=())
