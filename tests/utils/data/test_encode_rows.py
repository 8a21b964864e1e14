"""Chunks hold every row once, and what is kept of them is numbered as examples; workers need no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from tests.tiny import tiny_tokenizer
from utils.data import encode_rows
from utils.data.encode_rows import AbstractRecords, Chunk, EncodeRows, chunked
from utils.data.encoding import Encoder
from utils.data.record import RecordMaker
from utils.files.cells import Place
from utils.files.tables import Row

ROOT = Path(__file__).parents[3]
TOKENIZER = tiny_tokenizer()


def rows(count: int) -> list[tuple[Place, Row]]:
    return [(Place("--train_file", "x", number), {"abstract": f"cat {number}"}) for number in range(1, count + 1)]


def test_every_row_is_in_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_rows, "_ROWS_AT_ONCE", 3)
    for count in range(8):
        chunks = list(chunked(iter(rows(count)), None))
        assert [row for chunk in chunks for row in chunk.rows] == rows(count)
        assert [chunk.first for chunk in chunks] == list(range(0, count, 3))
        assert all(chunk.keep is None for chunk in chunks)


def test_examples_are_numbered_among_the_kept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_rows, "_ROWS_AT_ONCE", 3)
    keep = np.array([True, False, True, False, False, False, True])
    chunks = list(chunked(iter(rows(7)), keep))
    assert [chunk.first for chunk in chunks] == [0, 2, 2]
    encode = EncodeRows(AbstractRecords("Abstract: ", RecordMaker(TOKENIZER), "plain"), Encoder(TOKENIZER, 64), None)
    found = [encode(chunk) for chunk in chunks]
    assert [len(encoded.sizes) for encoded, _ in found] == [2, 0, 1]
    (whole, authors) = encode(Chunk([row for row, kept in zip(rows(7), keep, strict=True) if kept], None, 0))
    assert np.concatenate([encoded.ids for encoded, _ in found]).tolist() == whole.ids.tolist()
    assert authors == [None] * 3
    assert TOKENIZER.decode(whole.ids[: whole.sizes[0]]) == "Abstract: cat 1</s>"


@pytest.mark.parametrize("count", [6, 8])
def test_a_file_that_changes_between_two_readings_is_refused(count: int) -> None:
    """Otherwise rows would be kept that another row was chosen for."""
    with pytest.raises(InvalidArgument, match="other rows than a moment ago; let no other program write"):
        list(chunked(iter(rows(count)), np.ones(7, dtype=bool)))


def test_a_worker_starts_without_torch() -> None:
    program = (
        "import sys, utils.data.encode_rows, transformers.tokenization_utils_tokenizers; print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
