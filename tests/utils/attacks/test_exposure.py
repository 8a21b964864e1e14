"""Secrets are read, candidates have their form, and the rank is counted."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path

import numpy as np
import pytest

from dptune._validate import InvalidArgument
from utils.attacks.exposure import CHANCE_BITS, exposure, fill, random_candidates, read_secrets, require_uncut


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_rank_is_the_place_among_sorted_losses() -> None:
    losses = np.random.default_rng(0).permutation(np.arange(64.0))
    for row in range(64):
        found = exposure(np.concatenate([losses[row:], losses[:row]]))
        assert found.rank == int(losses[row]) + 1
        assert found.bits == pytest.approx(6 - math.log2(losses[row] + 1))
        assert found.chance == found.rank / 64


def test_a_tie_counts_against_the_secret() -> None:
    assert exposure(np.array([1.0, 1.0, 1.0, 2.0])).rank == 3


def test_an_unknown_secret_has_a_known_mean() -> None:
    bits = [exposure(np.arange(4096.0)[np.r_[row, :row, row + 1 : 4096]]).bits for row in range(4096)]
    assert np.mean(bits) == pytest.approx(CHANCE_BITS, abs=0.01)


def test_candidates_have_the_form_of_the_secret() -> None:
    generator = np.random.default_rng(1)
    found = random_candidates("Ab3-9", 300, generator)
    assert len(set(found)) == 300
    assert "Ab3-9" not in found
    kinds = (string.ascii_uppercase, string.ascii_lowercase, string.digits, "-", string.digits)
    assert all(len(one) == 5 and all(c in kind for c, kind in zip(one, kinds, strict=True)) for one in found)
    assert all(set(one) <= {"x", "y"} for one in random_candidates("xyxyxy", 20, generator, "xy"))


def test_a_small_form_gives_all_its_candidates() -> None:
    found = random_candidates("7", 1000, np.random.default_rng(2))
    assert sorted(found) == [str(number) for number in range(10) if number != 7]


def test_a_row_is_filled_at_every_depth() -> None:
    row = {"messages": [{"role": "user", "content": "{} and {}"}], "number": 3}
    assert fill(row, "x") == {"messages": [{"role": "user", "content": "x and x"}], "number": 3}


def test_secrets_are_read_with_their_candidates(tmp_path: Path) -> None:
    rows = [{"text": "pin {}", "secret": "12"}, {"text": "{}", "secret": "ann", "candidates": ["bob", "ann", "eve"]}]
    first, second = read_secrets(write(tmp_path / "s.jsonl", *rows), 50, seed=0)
    assert first.row == {"text": "pin {}"}
    assert len(first.candidates) == 50
    assert first.filled()[0] == {"text": "pin 12"}
    assert second.candidates == ("bob", "eve")
    assert [row["text"] for row in second.filled()] == ["ann", "bob", "eve"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "{}"}, "has no text in `secret`"),
        ({"text": "{}", "secret": 1234}, "has no text in `secret`"),
        ({"text": "pin", "secret": "hush"}, "has no {} where the secret stands"),
        ({"text": "{}", "secret": "hush", "alphabet": "a"}, "needs at least two characters"),
        ({"text": "{}", "secret": "hush", "candidates": "bob"}, "`candidates` is no list"),
        ({"text": "{}", "secret": "--"}, "has no candidate besides the secret"),
    ],
)
def test_a_mistake_names_the_row_and_not_the_secret(tmp_path: Path, row: dict[str, object], told: str) -> None:
    path = write(tmp_path / "s.jsonl", row)
    with pytest.raises(InvalidArgument) as refused:
        read_secrets(path, 10, seed=0)
    assert told in str(refused.value)
    assert "row 1" in str(refused.value)
    assert "hush" not in str(refused.value)


def test_a_cut_row_is_refused() -> None:
    require_uncut("s.jsonl", [False, False])
    with pytest.raises(InvalidArgument, match="row 2 is longer"):
        require_uncut("s.jsonl", [False, True])
