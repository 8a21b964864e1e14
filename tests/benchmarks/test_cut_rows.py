"""Rows to train on and rows to choose settings by are different rows of one file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cut_rows


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.tsv", 'label\tsentence\n1\ta "fine" film\n0\tthe mess\n1\tso good\n'),
        (
            "train.jsonl",
            '{"label": 1, "sentence": "a \\"fine\\" film"}\n{"label": 0, "sentence": "the mess"}\n'
            '{"label": 1, "sentence": "so good"}\n',
        ),
    ],
)
def test_the_last_rows_are_for_choosing(tmp_path: Path, name: str, text: str) -> None:
    (source := tmp_path / name).write_text(text)
    cut_rows.main([str(source), "--choose", "1", "--output_dir", str(tmp_path / "cut")])
    assert read(tmp_path / "cut" / "train.jsonl") == [
        {"label": 1, "sentence": 'a "fine" film'},
        {"label": 0, "sentence": "the mess"},
    ]
    assert read(tmp_path / "cut" / "choose.jsonl") == [{"label": 1, "sentence": "so good"}]


def test_no_row_left_to_train_on_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source := tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(SystemExit):
        cut_rows.main([str(source), "--choose", "2", "--output_dir", str(tmp_path / "cut")])
    assert "--choose=2: leaves no row of 2 to train on" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()
