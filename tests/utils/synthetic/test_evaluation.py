"""The comparison of samples whose answer is known: fresh real text, copies of training rows, and another language."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from utils.synthetic.arguments import HELD_OUT, StatisticsArguments
from utils.synthetic.evaluation import (
    divergences,
    embed_columns,
    lengths,
    memorised_rows,
    overlaps,
    quote,
    vocabularies,
)
from utils.synthetic.passages import SharedPassage
from utils.synthetic.texts import Comparison, Sample
from utils.synthetic.words import words_of

SETTINGS = StatisticsArguments(bootstrap=10)
TOPICS = ("cat dog bird fish horse cow", "red blue green white black grey", "one two three four five six")


class Letters:
    """Embeds a text as its share of each letter; remembers what it was fitted on."""

    def __init__(self) -> None:
        self.fitted: list[str] = []

    def fit(self, texts: Sequence[str]) -> None:
        self.fitted += texts

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.lower().count(chr(97 + n)) for n in range(26)] for text in texts], dtype=np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1)


def draw(seed: int, count: int, words: str = "") -> list[str]:
    """Texts of 12 words, each about one of three topics, or of `words`."""
    rng = random.Random(seed)
    return [" ".join(rng.choices((words or rng.choice(TOPICS)).split(), k=12)).capitalize() for _ in range(count)]


def sample(texts: list[str]) -> Sample:
    return Sample(texts, list(range(101, 101 + len(texts))))


def compare(synthetic: dict[str, list[str]], train: list[str] | None = None) -> Comparison:
    columns = {name: sample(texts) for name, texts in synthetic.items()}
    columns[HELD_OUT] = sample(draw(1, 60))
    return Comparison(columns, sample(draw(2, 60)), None if train is None else sample(train))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    train = draw(3, 80)
    near = [" ".join([*text.split()[:-1], "yesterday!"]) for text in train[:30]]
    return compare(
        {"fresh": draw(4, 90), "copies": train[:50], "near": near + draw(5, 40), "other": draw(6, 90, "xy zz")}, train
    )


def test_fresh_text_is_judged_like_real_text_and_another_language_is_not(comparison: Comparison) -> None:
    embedder = Letters()
    embedded = embed_columns(comparison, embedder)
    found = divergences(comparison, embedded, SETTINGS, seed=0)
    assert comparison.texts_a_column == 50
    assert found["fresh"].mauve > 0.8
    assert found[HELD_OUT].mauve > 0.8
    assert found["other"].mauve < 0.05
    assert embedder.fitted == comparison.reference.texts  # no column is better known to it than another


def test_words_are_compared_at_one_size(comparison: Comparison) -> None:
    found = vocabularies(comparison, seed=0)
    assert found.words == 600  # 50 copies of 12 words
    assert found.columns["other"].unseen == 1
    assert found.columns["fresh"].unseen == 0
    assert found.columns["fresh"].frequency_divergence < 0.1 < found.columns["other"].frequency_divergence
    assert all(curve.sum() == pytest.approx(1) for curve in found.curves.values())


def test_lengths_in_words_and_characters(comparison: Comparison) -> None:
    found = lengths(comparison)
    assert found["words"].columns["fresh"].mean == 12
    assert found["words"].columns["other"].wasserstein == 0
    assert found["characters"].columns["other"].mean == np.mean([len(t) for t in comparison.columns["other"].texts])
    assert found["characters"].columns["other"].ks == 1
    assert found["characters"].reference.wasserstein == 0


def test_copies_and_near_copies_are_found_and_fresh_text_is_not(comparison: Comparison) -> None:
    embedder = Letters()
    found = overlaps(comparison, embed_columns(comparison, embedder), embedder, passage_words=10)
    assert (found["copies"].copies, found["copies"].passages) == (50, 50)
    assert (found["near"].copies, found["near"].passages) == (0, 30)
    assert (found["fresh"].copies, found["fresh"].passages) == (0, 0)
    assert found["copies"].passage.nearer == 1
    assert found["copies"].similarity.quantiles == (1, 1, 1)
    assert found["copies"].similarity.nearer > 0.98  # a held-out text may have the same letters in another order
    assert abs(found["fresh"].passage.nearer - 0.5) < 4 * found["fresh"].passage.nearer_error
    assert found["near"].passage.nearer > 0.6
    assert found[HELD_OUT].passage.nearer == pytest.approx(0.5)
    assert found["other"].passage.quantiles == (0, 0, 0)


def test_what_is_listed_as_memorised_is_quoted_with_both_rows(comparison: Comparison) -> None:
    embedder = Letters()
    overlap = overlaps(comparison, embed_columns(comparison, embedder), embedder, passage_words=10)
    listed = list(memorised_rows(comparison, overlap, passage_words=10))
    assert [row["synthetic"] for row in listed] == ["copies"] * 50 + ["near"] * 30
    assert comparison.train is not None
    rows = dict(zip(comparison.train.rows, comparison.train.texts, strict=True))
    for row in listed:
        synthetic = comparison.columns[str(row["synthetic"])]
        text = synthetic.texts[synthetic.rows.index(int(str(row["synthetic_row"])))]
        passage = str(row["passage"])
        assert passage in text
        assert passage in rows[int(str(row["training_row"]))]
        assert len(words_of(passage)) == row["words"] >= 10
        assert row["kind"] == ("copy" if row["synthetic"] == "copies" else "passage")


def test_a_short_copy_is_listed_though_it_has_few_words() -> None:
    comparison = compare({"short": ["Hi you!", *draw(4, 20)]}, ["hi  you!", *draw(3, 20)])
    embedder = Letters()
    overlap = overlaps(comparison, embed_columns(comparison, embedder), embedder, passage_words=50)
    (row,) = memorised_rows(comparison, overlap, passage_words=50)
    assert (row["kind"], row["words"], row["passage"], row["training_row"]) == ("copy", 2, "Hi you!", 101)
    assert list(memorised_rows(comparison, overlap, passage_words=12)) == [row]


def test_a_quote_begins_and_ends_with_a_word() -> None:
    assert quote("“Well, I don’t know…” he said.", SharedPassage(length=4, start=1, row=0)) == "I don’t know"
