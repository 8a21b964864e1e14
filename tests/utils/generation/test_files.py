"""The folder of a generation: rows of every rank are kept, merged in order, and belong to one configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from dptune._validate import InvalidArgument
from utils.generation.files import (
    Generation,
    append_generations,
    digest_of_files,
    generation_journal,
    merge_generations,
    read_generations,
)  # fmt: skip


def test_rows_survive_odd_characters_and_torn_lines(tmp_path: Path) -> None:
    texts = ["two\nlines", "a\u2028b\x85c", 'quote " and \\', "é 漢 🙂", ""]
    rows: list[Generation] = [
        {"prompt": "p", "text": text, "index": index, "ended": True} for index, text in enumerate(texts)
    ]
    append_generations(tmp_path, 0, rows[:2])
    with (tmp_path / "generations.rank0.jsonl").open("ab") as file:
        file.write('{"prompt": "p", "text": "é'.encode()[:-1])  # cut within a character
    append_generations(tmp_path, 0, rows[2:3])
    append_generations(tmp_path, 7, rows[3:])
    assert read_generations(tmp_path) == dict(enumerate(rows))
    merge_generations(tmp_path, 5)
    assert read_generations(tmp_path) == dict(enumerate(rows))
    assert [path.name for path in tmp_path.iterdir()] == ["generations.jsonl"]


def test_a_merge_without_every_row_keeps_the_ranks_files(tmp_path: Path) -> None:
    append_generations(tmp_path, 0, [{"prompt": "p", "text": "t", "index": 0, "ended": True}])
    with pytest.raises(RuntimeError, match="1 generations are missing, the first is 1"):
        merge_generations(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["generations.rank0.jsonl"]


@pytest.mark.parametrize("merged", [True, False])
def test_texts_of_another_configuration_are_refused(tmp_path: Path, merged: bool) -> None:
    generation_journal(tmp_path).claim({"top_p": 0.9})
    append_generations(tmp_path, 3, [{"prompt": "p", "text": "t", "index": 0, "ended": True}])
    if merged:
        merge_generations(tmp_path, 1)
    generation_journal(tmp_path).claim({"top_p": 0.9})
    with pytest.raises(InvalidArgument, match=r"holds generations of another run \(top_p was 0\.9 and is 0\.5\)"):
        generation_journal(tmp_path).refuse_other_run({"top_p": 0.5})


def test_a_digest_is_of_content_order_and_where_one_file_ends(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, content in zip(paths, ["one", "two", "onet"], strict=True):
        path.write_text(content)
    (tmp_path / "d").write_text("wo")
    first, second, third = paths
    digests = [
        digest_of_files(*given) for given in ([first], [first, second], [second, first], [third, tmp_path / "d"])
    ]
    assert len(set(digests)) == 4
    first.rename(tmp_path / "e")
    assert digest_of_files(tmp_path / "e", second) == digests[1]
