"""MAUVE against its closed forms, and against what it must say of equal and of disjoint texts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from utils.synthetic.divergence import compare_embeddings, divergence_curve, frontier_integral, mauve_score

HALF, LEFT, RIGHT = np.array([0.5, 0.5]), np.array([1.0, 0.0]), np.array([0.0, 1.0])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback-Leibler divergence in nats."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def shares(seed: int, clusters: int = 6) -> np.ndarray:
    """Random shares, one of them 0."""
    drawn = np.random.default_rng(seed).dirichlet(np.full(clusters, 0.5))
    drawn[seed % clusters] = 0
    return drawn / drawn.sum()


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_that_of_the_definition(seed: int) -> None:
    sample, real = shares(seed), shares(seed + 100)
    curve = divergence_curve(sample, real, mixtures=3)
    for (across, up), weight in zip(curve[1:-1], (1 - 1e-6, 0.5, 1e-6), strict=True):
        mixed = weight * sample + (1 - weight) * real
        assert across == pytest.approx(np.exp(-5 * kl(sample, mixed)))
        assert up == pytest.approx(np.exp(-5 * kl(real, mixed)))
    assert curve[[0, -1]].tolist() == [[1, 0], [0, 1]]
    assert (np.diff(curve[:, 0]) <= 1e-12).all()


def test_equal_histograms_score_one_and_disjoint_ones_nearly_nothing() -> None:
    assert mauve_score(HALF, HALF) == pytest.approx(1)
    assert frontier_integral(HALF, HALF) == pytest.approx(0)
    # Disjoint: the curve is (w^5, (1 - w)^5), and the area below it is 5 * B(5, 6) = 1/252.
    fine = divergence_curve(LEFT, RIGHT, mixtures=2000)
    assert -np.trapezoid(fine[:, 1], fine[:, 0]) == pytest.approx(1 / 252, rel=1e-4)
    assert mauve_score(LEFT, RIGHT) == pytest.approx(1 / 252, rel=0.05)
    assert frontier_integral(LEFT, RIGHT) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_integral_is_the_integral(seed: int) -> None:
    sample, real = shares(seed), shares(seed + 100)

    def both(weight: float) -> float:
        mixed = weight * sample + (1 - weight) * real
        return weight * kl(sample, mixed) + (1 - weight) * kl(real, mixed)

    assert frontier_integral(sample, real) == pytest.approx(2 * quad(both, 0, 1)[0], rel=1e-6)
    assert frontier_integral(sample, real) == pytest.approx(frontier_integral(real, sample))
    assert mauve_score(sample, real) == pytest.approx(mauve_score(real, sample))


def clouds(seed: int, centres: list[int], size: int = 120) -> np.ndarray:
    """Points around some of ten directions."""
    rng = np.random.default_rng(seed)
    directions = np.eye(10)[rng.choice(centres, size)]
    return (directions + rng.normal(scale=0.05, size=(size, 10))).astype(np.float32)


def test_texts_beside_themselves_score_one() -> None:
    points = clouds(0, list(range(10)))
    found = compare_embeddings(points, points)
    assert found.mauve == pytest.approx(1)
    assert found.mauve_star == pytest.approx(1)
    assert (found.frontier_integral, found.missed, found.spurious) == (pytest.approx(0), 0, 0)
    assert found.clusters == 12


def test_fresh_texts_of_the_same_kind_score_high_and_others_nearly_nothing() -> None:
    real = clouds(0, list(range(5)))
    same = compare_embeddings(clouds(1, list(range(5))), real, clusters=5)
    assert same.mauve > 0.9
    other = compare_embeddings(clouds(2, list(range(5, 10))), real, clusters=10)
    assert other.mauve < 0.01
    assert (other.missed, other.spurious) == (1, 1)
    assert other.frontier_integral == pytest.approx(1)


def test_what_is_missed_and_what_is_spurious_are_told_apart() -> None:
    real = np.repeat(np.eye(4), [30, 30, 30, 10], axis=0)  # four kinds
    sample = np.repeat(np.eye(5)[:, :4] + np.eye(5)[:, 4:] * -1, [50, 0, 30, 0, 20], axis=0)
    found = compare_embeddings(sample, real, clusters=5)
    assert found.missed == pytest.approx(0.4)  # the second and the fourth kind
    assert found.spurious == pytest.approx(0.2)  # the fifth


def test_the_error_is_about_what_fresh_samples_differ_by() -> None:
    directions = np.eye(10)

    def score(seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        real = directions[rng.choice(10, 100, p=np.linspace(1, 19, 10) / 100)]
        sample = directions[rng.choice(10, 100, p=np.linspace(19, 1, 10) / 100)]
        found = compare_embeddings(sample, real, clusters=10, seed=seed, resamples=30)
        return found.mauve, found.mauve_error

    scores = np.array([score(seed) for seed in range(25)])
    assert 0.6 < scores[:, 1].mean() / scores[:, 0].std(ddof=1) < 1.7


def test_repeated_or_empty_embeddings_are_no_trouble() -> None:
    same = np.ones((20, 4), dtype=np.float32)
    assert compare_embeddings(same, same).mauve == pytest.approx(1)
    nothing = np.zeros((20, 4), dtype=np.float32)  # texts without any known word
    assert compare_embeddings(nothing, same).mauve < 0.01


def test_the_seed_decides() -> None:
    real, sample = clouds(0, list(range(10))), clouds(1, list(range(3, 10)))
    first, again, other = (compare_embeddings(sample, real, seed=seed) for seed in (0, 0, 1))
    assert first.mauve == again.mauve
    assert first.mauve_error == again.mauve_error
    assert first.mauve_error != other.mauve_error


def test_samples_of_unequal_size_are_refused() -> None:
    with pytest.raises(RuntimeError, match="5 texts beside 6"):
        compare_embeddings(np.eye(5), np.eye(6))
