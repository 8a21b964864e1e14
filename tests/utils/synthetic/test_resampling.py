"""Resampling: private records decide nothing but their own vote, and what is kept matches the votes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import cdist

from dptune._validate import InvalidArgument
from utils.synthetic.embeddings import make_embedder
from utils.synthetic.resampling import (
    CLUSTERERS,
    MINIBATCH,
    Buckets,
    cluster,
    distance,
    nearest,
    private_votes,
    quotas,
    resample,
    shares,
)

ANIMALS = [
    f"the {beast} {verb} in the field" for beast in ("cow", "horse", "sheep") for verb in ("ran", "slept", "ate")
]
MONEY = [
    f"{stock} shares {verb} on the market" for stock in ("steel", "oil", "bank") for verb in ("rose", "fell", "held")
]
SYNTHETIC = ANIMALS + MONEY


def two_buckets(clusterer: str = MINIBATCH) -> tuple[Buckets, object]:
    embedder = make_embedder()
    return cluster(SYNTHETIC, 2, embedder, seed=0, clusterer=clusterer), embedder


@pytest.mark.parametrize("clusterer", CLUSTERERS)
def test_clusters_tell_the_kinds_apart(clusterer: str) -> None:
    buckets, _ = two_buckets(clusterer)
    assert buckets.centers.shape[0] == len(buckets) == 2
    assert buckets.centers.dtype == np.float32
    again, _ = two_buckets(clusterer)
    assert np.array_equal(again.centers, buckets.centers)  # one seed, one result: a rerun finds its votes
    kinds = buckets.of_synthetic.reshape(2, 9)
    assert len(set(kinds[0])) == len(set(kinds[1])) == 1
    assert kinds[0, 0] != kinds[1, 0]


def test_one_private_record_changes_its_own_vote_and_no_other() -> None:
    """The whole way from texts to counts: embeddings and clusters come from synthetic texts alone."""
    real = ["a horse ran", "oil rose on the market", "bank shares", "Jane Roe has measles", ""]

    def counts(texts: list[str]) -> np.ndarray:
        embedder = make_embedder()
        return private_votes(texts, cluster(SYNTHETIC, 3, embedder, seed=0), embedder)

    whole = counts(real)
    assert whole.sum() == len(real)
    for left_out in range(len(real)):
        change = whole - counts(real[:left_out] + real[left_out + 1 :])
        assert sorted(change) == [0, 0, 1]


def test_private_records_are_embedded_each_by_itself() -> None:
    class Asked:
        def embed(self, texts: list[str], *, alone: bool = False) -> np.ndarray:
            assert alone
            return np.zeros((len(texts), 2), dtype=np.float32)

    buckets = Buckets(np.eye(2, dtype=np.float32), np.array([0, 1]))
    assert private_votes(["a", "b"], buckets, Asked()).tolist() == [2, 0]


def test_a_record_is_of_the_nearest_cluster() -> None:
    generator = np.random.default_rng(0)
    vectors, centers = (generator.normal(size=(count, 8)).astype(np.float32) for count in (50, 7))
    assert nearest(vectors, centers).tolist() == [int(cdist([one], centers).argmin()) for one in vectors]
    assert nearest(vectors[:0], centers).shape == (0,)


def test_a_records_cluster_does_not_depend_on_its_neighbours() -> None:
    """Even where centres all but coincide, as those of "hi", "hi!" and "hi?" do."""
    generator = np.random.default_rng(0)
    texts = generator.normal(size=(100, 64)).astype(np.float32)
    centers = np.repeat(texts, 3, axis=0) + generator.normal(size=(300, 64), scale=1e-7).astype(np.float32)
    vectors = texts[generator.integers(100, size=700)]
    whole = nearest(vectors, centers)
    assert [int(nearest(vectors[row : row + 1], centers)[0]) for row in range(len(vectors))] == whole.tolist()
    assert nearest(vectors[1:], centers).tolist() == whole[1:].tolist()


def test_negative_votes_count_as_none() -> None:
    assert shares(np.array([-5.0, 1.0, 3.0])).tolist() == [0, 0.25, 0.75]
    with pytest.raises(InvalidArgument, match="no cluster"):
        shares(np.array([-1.0, 0.0]))


@given(
    hnp.arrays(np.float64, 6, elements=st.floats(0, 1)),
    hnp.arrays(np.int64, 6, elements=st.integers(0, 30)),
    st.integers(1, 100),
)
def test_quotas_never_take_more_than_there_is_and_as_much_as_is_wanted(
    weights: np.ndarray, available: np.ndarray, total: int
) -> None:
    if weights.sum() == 0:
        return
    wanted = weights / weights.sum()
    taken = quotas(wanted, available, total)
    assert (taken >= 0).all()
    assert (taken <= available).all()
    assert taken[wanted == 0].sum() == 0
    assert taken.sum() == min(total, available[wanted > 0].sum())


def test_quotas_are_the_shares_where_there_is_enough() -> None:
    assert quotas(np.array([0.5, 0.3, 0.2]), np.array([90, 90, 90]), 10).tolist() == [5, 3, 2]
    assert quotas(np.array([0.5, 0.3, 0.2]), np.array([2, 90, 90]), 10).tolist() == [2, 5, 3]


def test_what_is_kept_matches_the_votes_and_none_is_kept_twice() -> None:
    buckets, _ = two_buckets()
    animals = buckets.of_synthetic[0]
    votes = np.where(np.arange(2) == animals, 30.0, 10.0)
    rows = resample(buckets, votes, 8, seed=1)
    assert len(set(rows.tolist())) == 8
    assert (rows < 9).sum() == 6
    assert distance(buckets, votes) == pytest.approx(0.25)
    assert distance(buckets, votes, rows) == pytest.approx(0)
    assert resample(buckets, votes, 8, seed=1).tolist() == rows.tolist()
    assert any(resample(buckets, votes, 8, seed=seed).tolist() != rows.tolist() for seed in range(2, 9))


def test_faiss_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.synthetic.resampling.find_spec", lambda _: None)
    with pytest.raises(InvalidArgument, match="pip install faiss-cpu"):
        two_buckets("faiss")


def test_more_buckets_than_texts_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="only 18 different synthetic texts"):
        cluster(SYNTHETIC * 2, 19, make_embedder(), seed=0)
