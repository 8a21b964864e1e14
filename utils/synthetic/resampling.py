"""Resample synthetic texts so that each kind is as frequent as among private texts, using a noisy histogram.

Yu et al. 2024, "Privacy-Preserving Instructions for Aligning Large Language Models": synthetic texts are clustered by
their embeddings, each private record votes for the nearest cluster, and synthetic texts are drawn to match the noisy
votes. Clusters and embeddings depend only on synthetic texts, so a private record affects only its own vote.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from dptune._validate import refuse
from dptune.histogram import votes
from utils.synthetic.embeddings import Embedder

MINIBATCH, FAISS = "minibatch", "faiss"
CLUSTERERS = (MINIBATCH, FAISS)


@dataclass(frozen=True)
class Buckets:
    """Clusters of synthetic texts.

    Attributes:
        centers: float32 [K, D].
        of_synthetic: each synthetic text's cluster, int [N].
    """

    centers: np.ndarray
    of_synthetic: np.ndarray

    def __len__(self) -> int:
        return len(self.centers)


def cluster(
    synthetic: Sequence[str], num_buckets: int, embedder: Embedder, seed: int, clusterer: str = MINIBATCH
) -> Buckets:
    """Fit `embedder` and K clusters to the synthetic texts.

    Args:
        synthetic: N texts.
        num_buckets: K.
        embedder: not fitted yet.
        seed: seed of the initial clusters.
        clusterer: "minibatch" (Sculley 2010, by scikit-learn) or "faiss" (k-means of the faiss library, an extra).

    Raises:
        InvalidArgument: there are fewer different texts than clusters, or faiss is not installed.
    """
    different = len(set(synthetic))
    if different < num_buckets:
        refuse("--num_buckets", num_buckets, f"there are only {different} different synthetic texts; give at most that")
    embedder.fit(synthetic)
    vectors = embedder.embed(synthetic)
    centers = _CLUSTERERS[clusterer](vectors, num_buckets, seed).astype(np.float32)
    return Buckets(centers, nearest(vectors, centers))


def _minibatch(vectors: np.ndarray, num_buckets: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans  # slow to import

    return np.asarray(MiniBatchKMeans(num_buckets, random_state=seed, n_init=3).fit(vectors).cluster_centers_)


def _faiss(vectors: np.ndarray, num_buckets: int, seed: int) -> np.ndarray:
    if find_spec("faiss") is None:
        refuse("--clusterer", FAISS, f"needs `pip install faiss-cpu`; {MINIBATCH} needs nothing")
    import faiss

    # Without min_points_per_centroid faiss warns below 39 texts per cluster, which is normal for small sets.
    found = faiss.Kmeans(vectors.shape[1], num_buckets, seed=seed, nredo=3, min_points_per_centroid=1)
    found.train(vectors)
    return np.asarray(found.centroids)


_CLUSTERERS = {MINIBATCH: _minibatch, FAISS: _faiss}


def private_votes(
    real: Sequence[str], buckets: Buckets, embedder: Embedder, units: Sequence[Hashable] | None = None
) -> np.ndarray:
    """Number of private records nearest to each cluster, float64 [K]. Do not release it: see `dptune.histogram`."""
    return votes(nearest(embedder.embed(real, alone=True), buckets.centers), len(buckets), units)


def nearest(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The nearest centre of each row, int64 [N]; it does not depend on the other rows.

    Rows are computed one at a time. In a matrix product the rounding of a row depends on its position. That could
    change the nearest centre where two centres nearly coincide.
    """
    return np.array([np.square(centers - row).sum(axis=1).argmin() for row in vectors], dtype=np.int64)


def shares(noisy_votes: np.ndarray) -> np.ndarray:
    """The share of texts to take from each cluster, float64 [K], sum 1. Negative votes count as 0.

    Raises:
        InvalidArgument: no vote is above 0.
    """
    kept = np.clip(noisy_votes, 0, None)
    if not kept.sum() > 0:
        refuse("--histogram_sigma", None, "no cluster has a positive noisy vote; use more records or less noise")
    return np.asarray(kept / kept.sum())


def quotas(wanted: np.ndarray, available: np.ndarray, total: int) -> np.ndarray:
    """How many texts to take from each cluster, int64 [K]: the `wanted` shares as far as texts are available.

    What a cluster lacks is taken from the others in proportion. Rounding is by largest remainders.

    Args:
        wanted: shares, sum 1.
        available: number of texts in each cluster.
        total: number of texts to take; fewer are taken if the wanted clusters have fewer.
    """
    taken = np.zeros(len(wanted), dtype=np.int64)
    while (missing := total - int(taken.sum())) > 0:
        open_shares = np.where(taken < available, wanted, 0.0)
        if not open_shares.sum() > 0:
            break
        ideal = missing * open_shares / open_shares.sum()
        whole = np.floor(ideal).astype(np.int64)
        rest = np.argsort(whole - ideal, kind="stable")[: missing - int(whole.sum())]
        whole[rest] += 1
        taken += np.minimum(whole, available - taken)
    return taken


def resample(buckets: Buckets, noisy_votes: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Rows of the synthetic texts to keep, ascending int64: drawn at random within each cluster, none twice.

    Raises:
        InvalidArgument: see `shares`.
    """
    available = np.bincount(buckets.of_synthetic, minlength=len(buckets))
    take = quotas(shares(noisy_votes), available, total)
    generator = np.random.default_rng(seed)
    kept = [
        generator.choice(np.flatnonzero(buckets.of_synthetic == bucket), size=count, replace=False)
        for bucket, count in enumerate(take)
        if count
    ]
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.int64)


def distance(buckets: Buckets, noisy_votes: np.ndarray, rows: np.ndarray | None = None) -> float:
    """Total variation distance between the cluster shares of synthetic texts (all, or `rows`) and of the noisy votes.

    It is computed from released values, so it may be published.
    """
    of_rows = buckets.of_synthetic if rows is None else buckets.of_synthetic[rows]
    counts = np.bincount(of_rows, minlength=len(buckets))
    return float(np.abs(counts / max(1, counts.sum()) - shares(noisy_votes)).sum() / 2)
