"""What is drawn, which losses belong to which row, and how texts are sampled and searched."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from tests.tiny import tiny_llama, tiny_tokenizer
from utils.attacks.arguments import AttackArguments
from utils.attacks.membership import LOSS, REFERENCE
from utils.attacks.perform import DrawnRows, copies, memberships, read_samples, sample
from utils.attacks.results import AUTHORS, ROWS
from utils.attacks.trained_run import AttackedRows
from utils.data.record import prompt_and_answer
from utils.data.tokenization import tokenize

TRAIN = [("Ask: ", "the cat sat on the mat"), ("", "a dog ran"), ("Tell: ", "we report")]
HELD_OUT = [("", "the sun is down"), ("Why? ", "I am fine"), ("", "blood pressure")]


@pytest.fixture
def rows() -> AttackedRows:
    train, held_out = (
        tokenize([prompt_and_answer(*row) for row in some], tiny_tokenizer(), 32) for some in (TRAIN, HELD_OUT)
    )
    authors = ["ann", "bob", "ann"], ["zoe", None, None]
    return AttackedRows(train, held_out, np.arange(3), np.arange(3), 0, authors)


def run_of() -> Any:
    """What is read of a run here."""
    return SimpleNamespace(tokenizer=padded(), groups=SimpleNamespace(data=SimpleNamespace(block_size=32)))


def padded() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def losses(*values: float) -> list[np.ndarray]:
    return [np.array([value, value]) for value in values]


def test_scores_go_with_their_rows_and_authors(rows: AttackedRows) -> None:
    start = {"members": losses(4, 4, 4), "others": losses(4, 4, 4)}
    trained = {"members": losses(1, 2, 3), "others": losses(4, 5, 6)}
    found = {one.of: one for one in memberships(rows, DrawnRows(np.arange(3), np.arange(3)), start, trained, 20)}
    assert list(found) == [ROWS, AUTHORS]
    assert found[ROWS].members[LOSS].tolist() == [-1, -2, -3]
    assert found[ROWS].others[REFERENCE].tolist() == [0, -1, -2]
    assert found[AUTHORS].members[LOSS].tolist() == [-2, -2], "ann has two rows"
    assert found[AUTHORS].others[LOSS].tolist() == [-4, -5, -6]
    assert found[ROWS].attacks[LOSS].auc == 1
    of_ann = {"members": losses(1, 3), "others": trained["others"]}
    before = {"members": losses(4, 4), "others": start["others"]}
    one_author = memberships(rows, DrawnRows(np.array([0, 2]), np.arange(3)), before, of_ann, 20)
    assert [one.of for one in one_author] == [ROWS], "a single author gives no rate"


def test_texts_follow_prompts_of_both_kinds_of_rows_in_turn(rows: AttackedRows) -> None:
    arguments = AttackArguments("out", num_samples=4, seed=3)
    drawn = DrawnRows(np.array([0, 2]), np.array([1]))
    texts = sample(tiny_llama(), run_of(), rows, drawn, arguments)
    assert len(texts) == 4
    assert texts == sample(tiny_llama(), run_of(), rows, drawn, arguments), "the seed decides"
    assert texts != sample(tiny_llama(), run_of(), rows, drawn, AttackArguments("out", num_samples=4, seed=4))


def test_equally_many_rows_of_each_kind_are_searched(rows: AttackedRows) -> None:
    some = AttackedRows(rows.train, rows.held_out, rows.members, rows.others[:2], 0, None)
    found = copies(["The cat sat on the mat.", "nothing"], run_of(), some, np.random.default_rng(0))
    assert found.rows == 2
    whole = copies(["The cat sat on the mat.", "nothing"], run_of(), rows, np.random.default_rng(0))
    assert whole.train.tolist() == [6, 0]
    assert whole.held_out.max() <= 1
    with pytest.raises(InvalidArgument, match="holds no text"):
        copies([], run_of(), rows, np.random.default_rng(0))


def test_samples_are_the_texts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(json.dumps({"prompt": "", "text": text, "index": 0}) + "\n" for text in "ab"))
    assert read_samples(str(path)) == ["a", "b"]
    path.write_text('{"answer": "a"}\n')
    with pytest.raises(InvalidArgument, match="--samples"):
        read_samples(str(path))
