"""The longest shared passages agree with a search of every run of words, and copies are told from chance."""

from __future__ import annotations

import random

import pytest

from utils.attacks.copied import compare_copies


def some(seed: int, count: int, words: int = 12) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices("abcdefgh", k=words)) for _ in range(count)]


def longest(text: str, rows: list[str]) -> int:
    words = text.split()
    runs = [words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    return max((len(run) for run in runs if any(f" {' '.join(run)} " in f" {row} " for row in rows)), default=0)


def test_passages_are_the_longest() -> None:
    texts, train, held_out = some(0, 12), some(1, 20), some(2, 20)
    found = compare_copies(texts, train, held_out)
    assert found.train.tolist() == [longest(text, train) for text in texts]
    assert found.held_out.tolist() == [longest(text, held_out) for text in texts]
    assert found.longer == sum(a > b for a, b in zip(found.train, found.held_out, strict=True))
    assert found.shorter == sum(a < b for a, b in zip(found.train, found.held_out, strict=True))
    assert not found.copies


def test_copies_of_training_rows_are_no_chance() -> None:
    train, held_out = some(1, 20), some(2, 20)
    found = compare_copies(train[:12], train, held_out)
    assert found.train.min() == 12
    assert found.chance == pytest.approx(0.5**12)
    assert found.copies
    assert not compare_copies(held_out[:12], train, held_out).copies


def test_one_long_copy_is_enough() -> None:
    row = " ".join(f"w{number}" for number in range(30))
    texts = [*some(0, 9), f"x {row[: row.index(' w20')]} y"]
    found = compare_copies(texts, [*some(1, 9), row], some(2, 10))
    assert (found.long, int(found.train.max())) == (1, 20)
    assert found.chance > 0.001
    assert found.copies
    shorter = compare_copies([*texts[:-1], row[: row.index(" w19")]], [*some(1, 9), row], some(2, 10))
    assert (shorter.long, shorter.copies) == (0, False)
    assert compare_copies(texts, [*some(1, 9), row], [*some(2, 9), row]).long == 0, "a held-out row has it too"


def test_nothing_shared_is_no_copy() -> None:
    found = compare_copies(["x y"], ["a"], ["b"])
    assert found.train.tolist() == [0]
    assert found.chance == 1


def test_unequal_numbers_of_rows_are_no_comparison() -> None:
    with pytest.raises(RuntimeError, match="no fair comparison"):
        compare_copies(["a"], ["a", "b"], ["a"])
