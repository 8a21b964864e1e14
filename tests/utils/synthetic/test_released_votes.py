"""Released votes are found again by what they follow from, and say nothing of it where they may be published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from utils.synthetic.released_votes import (
    HISTOGRAM_NAME,
    VOTES_STATE_NAME,
    ReleasedVotes,
    save_votes,
    saved_votes,
    texts_digest,
)

IDENTITY = {"real_file": texts_digest(["a private text"]), "seed": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    votes = ReleasedVotes(np.array([1.5, -2.0]), "an id", secret_noise=True)
    save_votes(tmp_path / "new", votes, {"sigma": 2.0}, IDENTITY)
    return tmp_path / "new"


def test_votes_are_found_as_they_were_released(folder: Path, tmp_path: Path) -> None:
    found = saved_votes(folder, IDENTITY)
    assert found is not None
    assert (found.votes.tolist(), found.release, found.secret_noise) == ([1.5, -2.0], "an id", True)
    assert saved_votes(tmp_path, IDENTITY) is None


def test_what_may_be_published_does_not_hold_what_the_votes_follow_from(folder: Path) -> None:
    published = json.loads((folder / HISTOGRAM_NAME).read_text())
    assert published == {"sigma": 2.0, "release": "an id", "secret_noise": True, "noisy_votes": [1.5, -2.0]}
    assert json.loads((folder / VOTES_STATE_NAME).read_text())["identity"] == IDENTITY


def test_other_records_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="its votes were made with other real_file, whose"):
        saved_votes(folder, {**IDENTITY, "real_file": texts_digest(["another"]), "whose": 1})


@pytest.mark.parametrize("name", [HISTOGRAM_NAME, VOTES_STATE_NAME])
def test_a_damaged_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(InvalidArgument, match="is damaged; give a new folder"):
        saved_votes(folder, IDENTITY)


def test_a_digest_is_of_the_texts_and_their_order() -> None:
    assert len({texts_digest(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a b"], ["a", "b", ""])}) == 5
