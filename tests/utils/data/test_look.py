"""What is shown of rows is what a run trains on, and the statistics are those of all rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from dptune.units.unit import PrivacyUnit
from tests.tiny import tiny_tokenizer
from utils.data.load import load_training_data
from utils.data.look import DRAWN, Look, look_at_rows, pieces, printable, shown_row, statistics
from utils.data.make_rows import RowSettings
from utils.data.sources import FileRows

TOKENIZER = tiny_tokenizer()


def pair(answer: str, **more: Any) -> dict[str, Any]:
    return {"instruction": "Say it.", "answer": answer, **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def look(*paths: Path, column: str | None = None, block_size: int = 64, **how: Any) -> Look:
    settings = RowSettings("plain", TOKENIZER, block_size, PrivacyUnit(column), 0, None, None)
    return look_at_rows(settings, FileRows(list(paths), "--train_file"), **how)


def test_the_rows_are_those_of_a_run(tmp_path: Path) -> None:
    """The tokens, what is learned, how many are cut and how many have no answer: compared with the trainer's arrays."""
    long = {"instruction": "Describe it. " * 20, "answer": "Well."}
    rows = [pair("yes"), pair("The cat sat on the mat. " * 9), long, pair("")]
    path = write(tmp_path / "a.jsonl", *rows)
    seen = look(path, chosen=range(1, 5), block_size=30)
    train, _ = load_training_data(
        dataset_name=None,
        train_file=path,
        validation_file=None,
        prompt_style="plain",
        tokenizer=TOKENIZER,
        block_size=30,
    )
    assert len(seen.shown) == len(train) == len(seen.lengths) == 4
    for row, start, stop in zip(seen.shown, train.starts[:-1], train.starts[1:], strict=True):
        assert row.ids[:30].tolist() == train.ids[start:stop].tolist()
        assert row.learned[:30].tolist() == train.is_answer[start:stop].tolist()
    assert seen.num_cut(30) == train.num_cut == 2
    assert seen.without_answer == train.num_without_answer == 1
    assert seen.prompt_style == train.prompt_style


def test_a_row_with_its_learned_tokens_in_brackets_or_in_colour(tmp_path: Path) -> None:
    (row,) = look(write(tmp_path / "a.jsonl", pair("I am fine, \x1b[2J")), chosen=[1]).shown
    head, plain = shown_row(row, TOKENIZER, 64, colour=False)
    learned = int(row.learned.sum())
    assert head == f"row 1  ({tmp_path}/a.jsonl, row 1)  {len(row.ids)} tokens, {learned} learned"
    before, _, after = plain.partition("·[")
    assert before.replace("·", "") == "Say it.\\n"
    assert after.replace("·", "") == "I am fine, \\x1b[2J</s>]"
    assert after.count("·") == learned - 1
    _, coloured = shown_row(row, TOKENIZER, 64, colour=True)
    assert coloured == f"{before}·\033[32m{after[:-1]}\033[0m"


def test_a_row_that_is_cut_says_so(tmp_path: Path) -> None:
    (row,) = look(write(tmp_path / "a.jsonl", pair("yes " * 40)), chosen=[1]).shown
    head, tokens = shown_row(row, TOKENIZER, 20, colour=False)
    assert head.endswith(f"cut: {len(row.ids) - 20} tokens are beyond --block_size 20")
    assert tokens.count("·") == 19
    assert "</s>" not in tokens


@pytest.mark.parametrize("text", ["Grüße, 東京 \U0001f600!", "  indented\n\tline", "</s> a <s>"])
def test_the_pieces_add_up_to_the_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert len(pieces(ids, TOKENIZER)) == len(ids)
    assert "".join(pieces(ids, TOKENIZER)) == text


def test_a_shown_line_is_one_line() -> None:
    assert printable("é\u2028\r\n\x07") == "é\\u2028\\r\\n\\x07"


def test_rows_keep_their_place_in_several_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", pair("one", who="ann"), pair("two"))
    second = write(tmp_path / "b.jsonl", pair("three", who="bo"))
    seen = look(first, second, column="who", chosen=[3, 2])
    told = [(row.number, Path(row.path).name, row.row, row.author) for row in seen.shown]
    assert told == [(2, "a.jsonl", 2, None), (3, "b.jsonl", 1, "bo")]
    assert shown_row(seen.shown[1], TOKENIZER, 64, colour=False)[1] == "author bo"
    assert (seen.rows_of, seen.alone) == ({"ann": 1, "bo": 1}, 1)


def test_rows_are_drawn_evenly(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(pair(str(number)) for number in range(6)))
    generator, counts = random.Random(0), Counter[int]()
    for _ in range(200):
        numbers = [row.number for row in look(path, generator=generator).shown]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == DRAWN
        counts.update(numbers)
    assert all(70 <= counts[number] <= 130 for number in range(1, 7)), counts  # 100 +- 4 standard deviations


def test_a_row_that_is_not_there_is_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^--rows=9: there are 1 rows"):
        look(write(tmp_path / "a.jsonl", pair("yes")), chosen=[1, 9])


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pair("yes"), pair("no"), {"no": "row of that form"})
    assert len(look(path, first=2).lengths) == 2
    with pytest.raises(InvalidArgument, match="row 3"):
        look(path)


def test_the_statistics_are_of_all_rows(tmp_path: Path) -> None:
    rows = [pair("a" * size, who=f"person {min(size, 3)}") for size in range(100)]
    path = write(tmp_path / "a.jsonl", *rows, pair("x"), {"instruction": "the hill " * 60, "answer": "x"})
    seen = look(path, column="who", block_size=50)
    lines = statistics(seen, 50, authors=True)
    lengths = sorted(seen.lengths)
    told = {line[:23].strip(): line[23:] for line in lines}
    cut = sum(length > 50 for length in lengths)
    assert told == {
        "rows": "102",
        "prompt style": "plain",
        "cut by --block_size": f"{cut} rows ({100 * cut / 102:.3g}%), at 50 tokens",
        "nothing to learn": "1 rows (0.98%): no answer, or --block_size cuts it off",
        "tokens before the cut": f"50% up to {lengths[50]}, 90% up to {lengths[91]}, 99% up to {lengths[100]}, "
        f"the longest {lengths[-1]}",
        "authors": "6; 2 of them are rows without a value",
        "rows per author": "median 1, largest 97",
    }
    assert np.median([1, 1, 1, 97, 1, 1]) == 1
    assert "only the first were read" in statistics(seen, 50, sampled=True)[0]
    assert len(statistics(seen, 50)) == 5
