"""MAUVE: how far apart two samples of texts are, from their embeddings.

One k-means clusters both samples. The two histograms over clusters are compared by a curve of Kullback-Leibler
divergences to their mixtures: one axis counts what the synthetic sample has and the real one lacks, the other the
reverse. MAUVE is the area under that curve, 1 for equal histograms and near 0 for disjoint ones (Pillutla et al. 2021,
"MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers").

The paper's package, `mauve-text`, is not used: it needs faiss and downloads its features. We keep its defaults (scaling
5, one cluster per ten texts, PCA to 90% of the variance) but use other embeddings. So compare values only with those of
the same embedder and the same number of texts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.special import rel_entr, xlogy
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning

_SCALING = 5.0
_MIXTURES = 25  # points of the curve besides its two ends
_EXPLAINED_VARIANCE = 0.9
_TEXTS_A_CLUSTER = 10
_CLUSTERINGS = 3  # to average over the randomness of k-means
_SMOOTHING = 0.5  # Krichevsky and Trofimov's, added to each count


@dataclass(frozen=True)
class Divergence:
    """How far a sample is from a real one of the same size; means over a few clusterings.

    Attributes:
        mauve: in (0, 1], 1 for equal.
        mauve_error: its standard error, from a bootstrap over texts and from the clusterings.
        mauve_star: MAUVE with smoothed histograms, which is less biased for small samples (Pillutla et al. 2023).
        frontier_integral: in [0, 1], 0 for equal (Liu et al. 2021).
        missed: share of the real texts in clusters with no text of the sample.
        spurious: share of the sample's texts in clusters with no real text.
        clusters: number of clusters.
        curve: `divergence_curve` of the first clustering.
    """

    mauve: float
    mauve_error: float
    mauve_star: float
    frontier_integral: float
    missed: float
    spurious: float
    clusters: int
    curve: np.ndarray


def compare_embeddings(
    sample: np.ndarray, real: np.ndarray, *, clusters: int | None = None, resamples: int = 200, seed: int = 0
) -> Divergence:
    """Compare two samples of the same size by their embeddings.

    Args:
        sample: float [N, D].
        real: float [N, D].
        clusters: number of k-means clusters; N / 10 but at least 2 if None. At most the number of different embeddings.
        resamples: bootstrap samples for the error; at least 2.
        seed: seed of the clusterings and the bootstrap.
    """
    if not len(sample) == len(real) >= 2:
        raise RuntimeError(f"{len(sample)} texts beside {len(real)}")
    points = _project(np.concatenate([sample, real]).astype(np.float64))
    wanted = max(2, round(len(real) / _TEXTS_A_CLUSTER)) if clusters is None else clusters
    wanted = min(wanted, len(np.unique(points, axis=0)))
    counts = [_cluster(points, len(sample), wanted, seed + number) for number in range(_CLUSTERINGS)]
    pairs = [(ours / ours.sum(), theirs / theirs.sum()) for ours, theirs in counts]
    smooth = [(_smoothed(ours), _smoothed(theirs)) for ours, theirs in counts]
    scores = np.array([mauve_score(*pair) for pair in pairs])
    rng = np.random.default_rng(seed)
    variances = [_bootstrap_variance(*pair, len(real), resamples, rng) for pair in pairs]
    return Divergence(
        mauve=float(scores.mean()),
        mauve_error=float(np.sqrt(np.mean(variances) + scores.var(ddof=1) / _CLUSTERINGS)),
        mauve_star=float(np.mean([mauve_score(*pair) for pair in smooth])),
        frontier_integral=float(np.mean([frontier_integral(*pair) for pair in pairs])),
        missed=float(np.mean([theirs[ours == 0].sum() for ours, theirs in pairs])),
        spurious=float(np.mean([ours[theirs == 0].sum() for ours, theirs in pairs])),
        clusters=wanted,
        curve=divergence_curve(*pairs[0]),
    )


def divergence_curve(sample: np.ndarray, real: np.ndarray, *, mixtures: int = _MIXTURES) -> np.ndarray:
    """The curve of two histograms: from (1, 0) through `mixtures` mixtures to (0, 1).

    Args:
        sample: shares that sum to 1, float64 [K].
        real: the same for the real texts.
        mixtures: evenly spread weights of the sample in the mixture, strictly between 0 and 1 but for rounding.

    Returns:
        exp(-5 * KL(sample | mixture)) and exp(-5 * KL(real | mixture)), float64 [mixtures + 2, 2]: the first falls
        from 1 to 0 while the second rises from 0 to 1.
    """
    weights = np.linspace(1 - 1e-6, 1e-6, mixtures)[:, None]
    mixed = weights * sample + (1 - weights) * real
    gaps = np.stack([rel_entr(histogram, mixed).sum(axis=1) for histogram in (sample, real)], axis=1)
    return np.concatenate([[[1.0, 0.0]], np.exp(-_SCALING * gaps), [[0.0, 1.0]]])


def mauve_score(sample: np.ndarray, real: np.ndarray) -> float:
    """The area under `divergence_curve`."""
    across, up = divergence_curve(sample, real).T
    return float(-np.trapezoid(up, across))


def frontier_integral(sample: np.ndarray, real: np.ndarray) -> float:
    """Mean over all mixtures of the two weighted divergences to the mixture, times 2, so that disjoint samples give 1.

    In closed form it is a sum over clusters of (p + q) / 2 - p q (ln p - ln q) / (p - q). The last term is p where
    p = q, and 0 where p or q is 0 (Liu et al. 2021, "Divergence Frontiers for Generative Models").
    """
    gap = sample - real
    apart = np.abs(gap) > 1e-8
    crossed = xlogy(sample * real, np.where(sample > 0, sample, 1)) - xlogy(sample * real, np.where(real > 0, real, 1))
    mean = np.where(apart, crossed / np.where(apart, gap, 1), sample)
    return float(((sample + real) / 2 - mean).sum())


def _project(points: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, then reduced by PCA to the axes that hold 90% of the variance."""
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    points = points / np.where(lengths > 0, lengths, 1)
    if np.ptp(points, axis=0).max() == 0:  # all rows are equal: no axis has any variance
        return points
    return PCA(n_components=_EXPLAINED_VARIANCE, svd_solver="full").fit_transform(points)


def _cluster(points: np.ndarray, size: int, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the first `size` points, and of the others, in each cluster."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters, by rounding
        labels = KMeans(clusters, n_init=1, random_state=seed).fit(points).labels_
    return np.bincount(labels[:size], minlength=clusters), np.bincount(labels[size:], minlength=clusters)


def _smoothed(counts: np.ndarray) -> np.ndarray:
    return (counts + _SMOOTHING) / (counts + _SMOOTHING).sum()


def _bootstrap_variance(
    sample: np.ndarray, real: np.ndarray, size: int, resamples: int, rng: np.random.Generator
) -> float:
    """Variance of the score over resamples of `size` texts from both histograms."""
    drawn = [rng.multinomial(size, histogram, size=resamples) / size for histogram in (sample, real)]
    return float(np.var([mauve_score(*pair) for pair in zip(*drawn, strict=True)], ddof=1))
