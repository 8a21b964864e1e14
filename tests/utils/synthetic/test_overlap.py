"""Copies, nearest rows and the chance of being nearer than held-out text, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from utils.synthetic import overlap as text_overlap
from utils.synthetic.overlap import compare_nearness, copied_rows, nearest_similarity


def test_copies_are_found_whatever_their_case_and_white_space() -> None:
    rows = ["Say hi.", "Tell me a joke", "say  hi."]
    assert copied_rows(["SAY\nhi. ", "tell me a joke!", "Tell me a joke"], rows) == [0, -1, 1]


def test_the_nearest_row_is_the_most_similar_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts, rows = (rng.normal(size=(size, 5)).astype(np.float32) for size in (23, 7))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    texts[3] = rows[5]
    expected = [max(float(text @ row) for row in rows) for text in texts]
    np.testing.assert_allclose(nearest_similarity(texts, rows), expected, atol=1e-5)
    assert nearest_similarity(texts, rows)[3] == 1
    monkeypatch.setattr(text_overlap, "_SIMILARITIES_AT_ONCE", 20)  # two texts at a time
    np.testing.assert_allclose(nearest_similarity(texts, rows), expected, atol=1e-5)


def test_the_chance_of_being_nearer_counts_pairs() -> None:
    rng = np.random.default_rng(1)
    sample, held_out = rng.integers(0, 6, size=30), rng.integers(0, 5, size=20)
    pairs = [1.0 if ours > theirs else 0.5 * (ours == theirs) for ours in sample for theirs in held_out]
    found = compare_nearness(sample, held_out)
    assert found.nearer == pytest.approx(np.mean(pairs))
    assert found.quantiles == (np.median(sample), np.quantile(sample, 0.95), sample.max())


def test_without_memorising_the_chance_is_a_half_and_with_it_one() -> None:
    values = np.arange(10.0)
    assert compare_nearness(values, values).nearer == pytest.approx(0.5)
    assert compare_nearness(values + 100, values).nearer == 1
    assert compare_nearness(values - 100, values).nearer == 0


def test_the_error_is_what_fresh_samples_differ_by() -> None:
    rng = np.random.default_rng(2)
    found = [compare_nearness(rng.normal(0.5, size=60), rng.normal(size=40)) for _ in range(400)]
    spread = np.std([one.nearer for one in found], ddof=1)
    assert np.mean([one.nearer_error for one in found]) == pytest.approx(spread, rel=0.15)
