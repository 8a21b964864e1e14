"""The comparison of synthetic samples with real text: numbers by column, and curves to plot.

All of it is computed on real rows, so none of it is protected by epsilon. It quotes no text, real or synthetic.
Passages that look memorised are returned separately, for their own file (`memorised_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dptune._validate import present
from utils.synthetic.arguments import StatisticsArguments
from utils.synthetic.divergence import Divergence, compare_embeddings
from utils.synthetic.embeddings import Embedder
from utils.synthetic.overlap import Nearness, compare_nearness, copied_rows, nearest_similarity
from utils.synthetic.passages import SharedPassage, longest_shared_passages
from utils.synthetic.statistics import (
    LengthComparison,
    VocabularyComparison,
    compare_lengths,
    compare_vocabulary,
    rank_frequencies,
)
from utils.synthetic.texts import HELD_OUT, Comparison, Sample
from utils.synthetic.words import take_words, word_spans


@dataclass(frozen=True)
class Words:
    """Vocabulary comparisons at an equal number of words, and Zipf's curve of each column."""

    words: int
    columns: dict[str, VocabularyComparison]
    curves: dict[str, np.ndarray]


@dataclass(frozen=True)
class Lengths:
    """Lengths in one unit; `reference` compares the reference with itself, so its gaps are 0."""

    columns: dict[str, LengthComparison]
    reference: LengthComparison
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Overlap:
    """A column compared with the training rows.

    Attributes:
        copies: how many texts are copies of a training row, ignoring case and white space.
        passages: how many are copies or share a passage of at least `passage_words` words with a training row.
        similarity: cosine similarity to the most similar row.
        passage: longest passage shared with a row, in words.
        similarities: of each text, to plot.
        lengths: length of each text's longest shared passage, to plot.
        found: for each text (copied row or -1, longest shared passage); rows are counted from 0.
    """

    texts: int
    copies: int
    passages: int
    similarity: Nearness
    passage: Nearness
    similarities: np.ndarray
    lengths: np.ndarray
    found: list[tuple[int, SharedPassage]]


def embed_columns(comparison: Comparison, embedder: Embedder) -> dict[str, np.ndarray]:
    """Embeddings by column, and of the reference under the name "".

    The embedder is fitted only to the reference. So the held-out column is as new to it as the synthetic ones, and the
    numbers of a column do not depend on other columns.
    """
    embedder.fit(comparison.reference.texts)
    samples = {**comparison.columns, "": comparison.reference}
    return {name: embedder.embed(sample.texts) for name, sample in samples.items()}


def divergences(
    comparison: Comparison, embedded: dict[str, np.ndarray], arguments: StatisticsArguments, seed: int
) -> dict[str, Divergence]:
    """MAUVE and related divergences for each column, all with the same number of texts."""
    count = comparison.texts_a_column
    return {
        name: compare_embeddings(
            embedded[name][:count],
            embedded[""][:count],
            clusters=arguments.clusters,
            resamples=arguments.bootstrap,
            seed=seed,
        )
        for name in comparison.columns
    }


def vocabularies(comparison: Comparison, seed: int) -> Words:
    """The words of each column compared with the reference's, all cut to the word count of the shortest sample."""
    texts = {name: sample.words() for name, sample in comparison.columns.items()}
    reference = comparison.reference.words()
    count = min(sum(map(len, sample)) for sample in (*texts.values(), reference))
    cut = {name: take_words(sample, count, seed) for name, sample in texts.items()}
    real = take_words(reference, count, seed)
    columns = {name: compare_vocabulary(sample, real) for name, sample in cut.items()}
    return Words(count, columns, {name: rank_frequencies(sample) for name, sample in cut.items()})


def lengths(comparison: Comparison) -> dict[str, Lengths]:
    """Lengths in words and in characters."""

    def measure(sample: Sample, unit: str) -> np.ndarray:
        return np.array([len(word_spans(text)) if unit == "words" else len(text) for text in sample.texts])

    units = {}
    for unit in ("words", "characters"):
        real = measure(comparison.reference, unit)
        values = {name: measure(sample, unit) for name, sample in comparison.columns.items()}
        columns = {name: compare_lengths(ours.tolist(), real.tolist()) for name, ours in values.items()}
        units[unit] = Lengths(columns, compare_lengths(real.tolist(), real.tolist()), values)
    return units


def overlaps(
    comparison: Comparison, embedded: dict[str, np.ndarray], embedder: Embedder, passage_words: int
) -> dict[str, Overlap]:
    """Each column compared with the training rows, and its nearness to them with that of the held-out column."""
    columns, train = comparison.columns, present(comparison.train, "training set")
    rows = embedder.embed(train.texts)
    similarities = {name: nearest_similarity(embedded[name], rows) for name in columns}
    searched = [words for sample in columns.values() for words in sample.words()]
    passages = iter(longest_shared_passages(searched, train.words()))
    found = {name: [next(passages) for _ in sample.texts] for name, sample in columns.items()}
    sizes = {name: np.array([passage.length for passage in found[name]]) for name in columns}
    result = {}
    for name, sample in columns.items():
        copies = copied_rows(sample.texts, train.texts)
        pairs = list(zip(copies, found[name], strict=True))
        result[name] = Overlap(
            texts=len(sample),
            copies=sum(row >= 0 for row in copies),
            passages=sum(_is_memorised(row, passage, passage_words) for row, passage in pairs),
            similarity=compare_nearness(similarities[name], similarities[HELD_OUT]),
            passage=compare_nearness(sizes[name], sizes[HELD_OUT]),
            similarities=similarities[name],
            lengths=sizes[name],
            found=pairs,
        )
    return result


def memorised_rows(
    comparison: Comparison, overlap: dict[str, Overlap], passage_words: int
) -> Iterator[dict[str, object]]:
    """The synthetic texts that copy a training row or share a long passage with one, the longest passages first.

    Yields:
        synthetic, synthetic_row, training_row (rows counted from 1, as in the files), kind ("copy" or "passage"), words
        and passage, which may quote a person's private text.
    """
    train = present(comparison.train, "training set")
    for name, sample in comparison.synthetic.items():
        pairs = enumerate(overlap[name].found)
        long = [(number, *pair) for number, pair in pairs if _is_memorised(*pair, passage_words)]
        for number, copy, passage in sorted(long, key=lambda entry: (-entry[2].length, entry[0])):
            text = sample.texts[number]
            yield {
                "synthetic": name,
                "synthetic_row": sample.rows[number],
                "training_row": train.rows[copy if copy >= 0 else passage.row],
                "kind": "copy" if copy >= 0 else "passage",
                "words": passage.length,
                "passage": text if copy >= 0 else quote(text, passage),
            }


def quote(text: str, passage: SharedPassage) -> str:
    """The characters of `text` from a passage's first word to its last."""
    spans = word_spans(text)[passage.start : passage.start + passage.length]
    return text[spans[0][0] : spans[-1][1]]


def _is_memorised(copy: int, passage: SharedPassage, passage_words: int) -> bool:
    return copy >= 0 or passage.length >= passage_words
