"""Choosing synthetic texts so that their kinds are as frequent as among private ones, by a noisy histogram of those.

Yu et al. 2024, "Privacy-Preserving Instructions for Aligning Large Language Models": synthetic texts are clustered by
their embeddings, each private record votes for the nearest cluster, and synthetic texts are drawn to match the noisy
votes. Clusters and embeddings come from synthetic texts alone, so a private record decides nothing but its own vote.
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
        seed: of the clusters' start.
        clusterer: "minibatch" (Sculley 2010, scikit-learn's) or "faiss" (the faiss library's k-means, an extra).

    Raises:
        InvalidArgument: fewer different texts than clusters, or faiss is not installed.
    """
    different = len(set(synthetic))
    if different < num_buckets:
        refuse("--num_buckets", num_buckets, f"there are only {different} different synthetic texts; give at most that")
    embedder.fit(synthetic)
    vectors = embedder.embed(synthetic)
    centers = _CLUSTERERS[clusterer](vectors, num_buckets, seed).astype(np.float32)
    return Buckets(centers, nearest(vectors, centers))


def _minibatch(vectors: np.ndarray, num_buckets: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans  # slow to import: not before it is used

    return np.asarray(MiniBatchKMeans(num_buckets, random_state=seed, n_init=3).fit(vectors).cluster_centers_)


def _faiss(vectors: np.ndarray, num_buckets: int, seed: int) -> np.ndarray:
    if find_spec("faiss") is None:
        refuse("--clusterer", FAISS, f"needs `pip install faiss-cpu`; {MINIBATCH} needs nothing")
    import faiss

    # It warns below 39 texts a cluster, which small sets have.
    found = faiss.Kmeans(vectors.shape[1], num_buckets, seed=seed, nredo=3, min_points_per_centroid=1)
    found.train(vectors)
    return np.asarray(found.centroids)


_CLUSTERERS = {MINIBATCH: _minibatch, FAISS: _faiss}


def private_votes(
    real: Sequence[str], buckets: Buckets, embedder: Embedder, units: Sequence[Hashable] | None = None
) -> np.ndarray:
    """How many private records are nearest to each cluster, float64 [K]: not for release (`dptune.histogram`)."""
    return votes(nearest(embedder.embed(real, alone=True), buckets.centers), len(buckets), units)


def nearest(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The nearest centre of each row, int64 [N]: of that row alone, whatever stands beside it.

    One row at a time: a product of many rows rounds each by its place among them, and where two centres all but
    coincide, as they do when texts are fewer than they seem, that would choose between them.
    """
    return np.array([np.square(centers - row).sum(axis=1).argmin() for row in vectors], dtype=np.int64)


def shares(noisy_votes: np.ndarray) -> np.ndarray:
    """What part of the texts should come from each cluster, float64 [K], sum 1: negative votes count as none.

    Raises:
        InvalidArgument: no vote is above 0.
    """
    kept = np.clip(noisy_votes, 0, None)
    if not kept.sum() > 0:
        refuse("--histogram_sigma", None, "no bucket has more votes than noise: take more records or less noise")
    return np.asarray(kept / kept.sum())


def quotas(wanted: np.ndarray, available: np.ndarray, total: int) -> np.ndarray:
    """How many texts to take from each cluster, int64 [K]: as `wanted` says as far as there are enough.

    What a cluster lacks is taken from the others in their proportions. Whole numbers by largest remainders.

    Args:
        wanted: shares, sum 1.
        available: texts in each cluster.
        total: texts to take; fewer where the clusters that are wanted have fewer.
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
    """Which synthetic texts to keep, ascending int64: none twice, drawn at random within each cluster.

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
    """Total variation between the clusters of synthetic texts (all, or `rows`) and what the noisy votes ask for.

    Computed from what is released: it may be published.
    """
    of_rows = buckets.of_synthetic if rows is None else buckets.of_synthetic[rows]
    counts = np.bincount(of_rows, minlength=len(buckets))
    return float(np.abs(counts / max(1, counts.sum()) - shares(noisy_votes)).sum() / 2)
