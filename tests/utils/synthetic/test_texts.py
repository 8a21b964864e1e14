"""Files into samples; bad ones are refused by row, without a word of what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.cli.flags import parse
from utils.synthetic.arguments import HELD_OUT, TextArguments
from utils.synthetic.texts import Comparison, load_comparison

SECRET = "My number is Zyzzyva"


def write(path: Path, texts: list[object], column: str = "instruction") -> str:
    path.write_text("".join(json.dumps({column: text, "id": number}) + "\n" for number, text in enumerate(texts)))
    return str(path)


def load(folder: Path, *flags: str, synthetic: list[object] | None = None) -> Comparison:
    made = write(folder / "made.jsonl", synthetic or [f"made {n}" for n in range(15)])
    held = write(folder / "held.jsonl", [f"held {n}" for n in range(21)])
    line = ["--synthetic_file", made, "--held_out_file", held, "--output_dir", str(folder / "out"), *flags]
    return load_comparison(*parse(TextArguments, args=line))


def test_the_held_out_texts_are_halved_and_nothing_is_lost(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert (len(found.reference), len(found.columns[HELD_OUT])) == (11, 10)
    assert sorted(found.held_out) == sorted(f"held {n}" for n in range(21))
    assert list(found.columns) == [HELD_OUT, "made"]
    assert list(found.synthetic) == ["made"]
    assert found.texts_a_column == 10
    assert found.train is None


def test_rows_are_numbered_as_in_the_file_and_blank_ones_left_out(tmp_path: Path) -> None:
    texts: list[object] = [f"made {n}" for n in range(12)]
    found = load(tmp_path, synthetic=[" \n", *texts, ""]).columns["made"]
    assert found.blank == 2
    assert sorted(found.rows) == list(range(2, 14))
    assert all(text == f"made {row - 2}" for text, row in zip(found.texts, found.rows, strict=True))
    assert found.rows != sorted(found.rows)


def test_max_texts_draws_by_the_seed_but_keeps_all_training_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [f"row {n}" for n in range(40)])
    drawn = [load(tmp_path, "--max_texts", "12", "--train_file", train, "--seed", seed) for seed in "012"]
    assert {len(one.columns["made"]) for one in drawn} == {12}
    assert {len(one.held_out) for one in drawn} == {12}
    assert len({tuple(one.columns["made"].texts) for one in drawn}) == 3
    assert [len(one.train or []) for one in drawn] == [40, 40, 40]


def test_real_files_may_have_another_column(tmp_path: Path) -> None:
    made = write(tmp_path / "a.jsonl", [f"made {n}" for n in range(10)])
    held = write(tmp_path / "b.jsonl", [f"held {n}" for n in range(20)], "text")
    line = ["--synthetic_file", made, "--held_out_file", held, "--output_dir", "out", "--real_column", "text"]
    assert len(load_comparison(*parse(TextArguments, args=line)).held_out) == 20
    with pytest.raises(InvalidArgument, match=r"--text_column='instruction': no such column in .*b.jsonl"):
        load_comparison(*parse(TextArguments, args=line[:-2]))


@pytest.mark.parametrize(
    ("made", "held", "complaint"),
    [
        (["word"] * 20, ["word", *["?!"] * 19], "one half of its rows has no word in it"),
        (["word", *["?!"] * 399], ["word"] * 20, "the sample drawn from it has no word in it"),
    ],
)
def test_texts_that_are_compared_have_words(
    made: list[object], held: list[object], complaint: str, tmp_path: Path
) -> None:
    files = [
        "--synthetic_file",
        write(tmp_path / "a.jsonl", made),
        "--held_out_file",
        write(tmp_path / "b.jsonl", held),
    ]
    with pytest.raises(InvalidArgument, match=complaint):
        load_comparison(
            *parse(
                TextArguments, args=[*files, "--output_dir", str(tmp_path / "out"), "--max_texts", "20", "--seed", "1"]
            )
        )


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([SECRET] * 9 + [" "], "has 9 texts that are not blank; give at least 10"),
        ([SECRET] * 10 + [7], r"row 11 \(counted from 1\): instruction is not text \(int\)"),
        ([SECRET] * 10 + [None], r"row 11 \(counted from 1\): instruction is not text \(no value\)"),
        (["?!"] * 20, "has no word in it"),
    ],
)
def test_bad_rows_are_refused_and_never_shown(tmp_path: Path, texts: list[object], complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint) as caught:
        load(tmp_path, synthetic=texts)
    assert "Zyzzyva" not in str(caught.value)
    assert "\n" not in str(caught.value)
