"""The test for contamination counts what a model knows by heart, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import contamination
from benchmarks.contamination import ContaminationArguments, Continued, continue_texts, right_in_a_row
from dptune import InvalidArgument


class CountsUp:
    """A model that continues every text with the next numbers."""

    device = torch.device("cpu")

    def generate(self, *, input_ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        following = input_ids[:, -1:] + torch.arange(1, max_new_tokens + 1)
        return torch.cat([input_ids, following], dim=1)


def arguments(tmp_path: Path, **values: object) -> ContaminationArguments:
    return ContaminationArguments(**({"model_name_or_path": "m", "file": "f", "output": str(tmp_path / "o")} | values))


def test_only_tokens_before_the_first_mistake_count():
    written = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    assert right_in_a_row(written, torch.tensor([[1, 2, 3]] * 3)) == [3, 1, 0]


def test_the_rest_of_each_long_text_is_compared(tmp_path):
    args = arguments(tmp_path, beginning=2, continuation=3, batch_size=2)
    texts = [[1, 2, 3, 4, 5, 99], [1, 2, 3, 7, 5], [1, 2, 3, 4], [5, 1, 9, 9, 9]]
    assert continue_texts(CountsUp(), texts, args) == Continued(3, 1, 2, 3, [3, 1, 0])


def test_the_paragraph_counts_texts_without_a_mistake():
    words = Continued(3, 1, 2, 3, [3, 1, 0]).in_words()
    assert "continued 1 of 3 for 3 tokens" in words
    assert "1.3 tokens right in a row on average and 3 at most" in words
    assert "1 texts were too short" in words


def test_a_row_without_a_column_is_refused_before_the_model_is_loaded(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"title": "a", "text": "b"}) + "\n" + json.dumps({"title": "c"}) + "\n")
    with pytest.raises(InvalidArgument, match="--columns='title text': row 2 has no text"):
        contamination.main(arguments(tmp_path, file=str(rows), model_name_or_path="no-such-model"))
    assert not (tmp_path / "o").exists()


def test_texts_that_are_all_too_short_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="--file='f': has no text of 100 tokens"):
        continue_texts(CountsUp(), [[1, 2]], arguments(tmp_path))


def test_the_program_writes_its_counts(tiny_model_dir, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"title": "a", "text": "b c d e f g h i j"}) + "\n")
    contamination.main(
        arguments(tmp_path, model_name_or_path=str(tiny_model_dir), file=str(rows), beginning=2, continuation=3)
    )
    known = SimpleNamespace(**json.loads((tmp_path / "o").read_text()))
    assert (known.texts, len(known.in_a_row)) == (1, 1)
    assert "without a mistake" in capsys.readouterr().out
