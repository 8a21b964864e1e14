"""Compare the words and lengths of two samples of texts.

Functions take words, not texts (`utils.synthetic.words`). Statistics that depend on the number of words need samples of
equal size: see `utils.synthetic.words.take_words`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp, wasserstein_distance

LENGTH_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Texts = Sequence[Sequence[str]]  # the words of each text


@dataclass(frozen=True)
class VocabularyComparison:
    """The words of a sample compared with those of a real one.

    Attributes:
        size: number of different words in the sample.
        unseen: share of the sample's words, counting repetitions, that the real sample lacks.
        missed: share of the real sample's words, counting repetitions, that the sample lacks.
        distinct: share of different runs among all runs of 1, 2 and 3 words within a text (Li et al. 2016).
        frequency_divergence: Jensen-Shannon divergence of the word frequencies in bits: 0 equal, 1 no common word.
    """

    size: int
    unseen: float
    missed: float
    distinct: tuple[float, float, float]
    frequency_divergence: float


@dataclass(frozen=True)
class LengthComparison:
    """Lengths of a sample's texts compared with those of real ones.

    Attributes:
        mean: of the sample.
        quantiles: of the sample, at LENGTH_QUANTILES.
        wasserstein: how much lengths must change on average to match the real ones, in the unit of the lengths.
        ks: Kolmogorov-Smirnov statistic, the largest gap between the two distribution functions.
        ks_p: its p-value: probability of at least this gap between two samples of one distribution.
    """

    mean: float
    quantiles: tuple[float, ...]
    wasserstein: float
    ks: float
    ks_p: float


def compare_vocabulary(sample: Texts, real: Texts) -> VocabularyComparison:
    """Compare the words of two samples with the same number of words, at least one."""
    ours, theirs = count_words(sample), count_words(real)
    if not ours.total() == theirs.total() > 0:
        raise RuntimeError(f"{ours.total()} words beside {theirs.total()}")
    return VocabularyComparison(
        size=len(ours),
        unseen=share_outside(ours, theirs),
        missed=share_outside(theirs, ours),
        distinct=(distinct_share(sample, 1), distinct_share(sample, 2), distinct_share(sample, 3)),
        frequency_divergence=frequency_divergence(ours, theirs),
    )


def count_words(texts: Texts) -> Counter[str]:
    """How often each word occurs."""
    return Counter(word for text in texts for word in text)


def share_outside(counts: Counter[str], known: Counter[str]) -> float:
    """Share of the words in `counts`, counting repetitions, that `known` lacks.

    >>> share_outside(Counter(a=3, b=1), Counter(a=1))
    0.25
    """
    return sum(count for word, count in counts.items() if word not in known) / counts.total()


def distinct_share(texts: Texts, run: int) -> float:
    """Share of different runs among all runs of `run` words within a text; NaN if no text is that long.

    >>> distinct_share([["a", "b", "a", "b"]], 2)
    0.6666666666666666
    """
    runs = Counter(tuple(text[start : start + run]) for text in texts for start in range(len(text) - run + 1))
    return len(runs) / runs.total() if runs else float("nan")


def frequency_divergence(one: Counter[str], other: Counter[str]) -> float:
    """Jensen-Shannon divergence of two word counts in bits, symmetric, 0 to 1.

    Two samples of one language also differ by chance, small ones more. Compare with the value of two real samples.
    """
    words = sorted(one.keys() | other.keys())
    frequencies = [np.array([counts[word] for word in words], dtype=np.float64) for counts in (one, other)]
    distance = float(jensenshannon(*frequencies, base=2))  # the square root of the divergence
    return min(distance**2, 1.0)


def rank_frequencies(texts: Texts) -> np.ndarray:
    """Frequencies of the different words, most frequent first, float64 summing to 1 (Zipf's curve)."""
    counts = np.array(sorted(count_words(texts).values(), reverse=True), dtype=np.float64)
    return counts / counts.sum()


def compare_lengths(sample: Sequence[int], real: Sequence[int]) -> LengthComparison:
    """Compare the lengths of two samples of texts, at least one text each."""
    ks = ks_2samp(sample, real)
    return LengthComparison(
        mean=float(np.mean(sample)),
        quantiles=tuple(np.quantile(sample, LENGTH_QUANTILES).tolist()),
        wasserstein=float(wasserstein_distance(sample, real)),
        ks=float(ks.statistic),
        ks_p=float(ks.pvalue),
    )
