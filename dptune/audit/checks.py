"""Exact tests of what a mechanism released: noise, contributions and draws as the accounting assumes them.

An adversary would look where the noise is missing: in one coordinate, in the difference of two neighbours, in a dense
direction, in one layer, or in the difference of two steps, launches or ranks that share a seed. Each test is exact for
the mechanism as it is stated, so a `Finding` that contradicts it is false with a probability of at most `alpha`.

Noise is given in units of the stated standard deviation. Shapes: S steps, P values, U units, N rows, K pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dptune.audit.bounds import clopper_pearson, unlikely_normal
from dptune.mechanism import ROUNDING

_DIRECTIONS = 32  # dense ones, orthonormal
_MOST_PAIRED = 4096  # values whose pairs are all compared; P^2 numbers are held at a time


@dataclass(frozen=True)
class Finding:
    """The answer of one test or bound.

    Attributes:
        question: what was tested.
        found: the bound that holds with the audit's confidence.
        stated: what the mechanism states.
        contradicted: whether the two contradict each other.
        measured: what `found` and `stated` are, in words.
        observations: how many independent numbers it was computed from.
    """

    question: str
    found: float
    stated: float
    contradicted: bool
    measured: str
    observations: int


def noise_everywhere(noise_SP: Tensor, alpha: float) -> list[Finding]:
    """Whether every coordinate, difference of neighbours and dense direction has its noise."""
    differences = (noise_SP[:, 1:] - noise_SP[:, :-1]) / math.sqrt(2)
    size, generator = noise_SP.shape[1], torch.Generator().manual_seed(0)
    dense = torch.linalg.qr(torch.randn(size, min(size, _DIRECTIONS), generator=generator))[0]
    looked_at = {
        "every single coordinate": noise_SP,
        "every difference of neighbouring coordinates": differences,
        "dense random directions": noise_SP @ dense,
    }
    return [_least_noise(f"noise in {name}", values, alpha / len(looked_at)) for name, values in looked_at.items()]


def noise_of_tensors(noise_SP: Tensor, sizes: dict[str, int], alpha: float) -> Finding:
    """Whether every tensor of the model has its noise, all of its values together: the sharpest test of how much.

    Args:
        noise_SP: the noise.
        sizes: {tensor: its number of values}, in order; they add up to P.
        alpha: the maximum probability of a false contradiction.
    """
    bounds = {
        name: _std_bound(float(part.double().square().sum()), part.numel(), alpha / len(sizes))
        for name, part in zip(sizes, noise_SP.split(list(sizes.values()), dim=1), strict=True)
    }
    least = min(bounds, key=lambda name: bounds[name])
    return _too_little(f"noise in every trained tensor (least in {least})", bounds[least], noise_SP.numel())


def noise_of_pairs(question: str, ones: Tensor, others: Tensor, alpha: float) -> Finding:
    """Whether subtracting or adding two releases takes noise away, as it does if they share a seed.

    Args:
        question: what the pairs are.
        ones, others: the noise of both, of one shape; independent if the mechanism is as stated.
        alpha: see `noise_of_tensors`.
    """
    sums = [float((ones + sign * others).double().square().sum()) / 2 for sign in (1, -1)]
    bound = min(_std_bound(value, ones.numel(), alpha / 2) for value in sums)
    return _too_little(question, bound, ones.numel())


def correlated_coordinates(noise_SP: Tensor, alpha: float) -> Finding:
    """Whether any two coordinates share noise, in all steps together (Student's exact test of a correlation)."""
    from scipy.stats import t as student

    values = noise_SP[:, :_MOST_PAIRED]
    unit = values / values.norm(dim=0).clamp_min(1e-30)
    cosines = (unit.T @ unit).fill_diagonal_(0)
    pairs = unit.shape[1] * (unit.shape[1] - 1) // 2
    degrees = len(values) - 1
    limit = float(student.isf(alpha / (2 * max(pairs, 1)), degrees))
    most = limit / math.sqrt(degrees + limit**2)
    found = float(cosines.abs().max())
    words = "largest correlation of two coordinates' noise; chance explains at most the stated one"
    return Finding("noise shared by coordinates", found, most, found > most, words, len(values))


def contributions(
    observed_SU: np.ndarray, counts_SU: np.ndarray, homes: list[str], noise_multiplier: float, alpha: float
) -> list[Finding]:
    """Whether a unit's contribution is at most C, for the units of every home layer.

    Args:
        observed_SU: the releases along the units' directions, over C.
        counts_SU: how many rows of each unit contributed.
        homes: the home layer of each unit, [U].
        noise_multiplier: sigma.
        alpha: see `noise_of_tensors`; of all findings together.
    """
    layers, findings = sorted(set(homes)), []
    for layer in layers:
        own = np.array([home == layer for home in homes])
        seen, counts = observed_SU[:, own], counts_SU[:, own].astype(np.float64)
        weight = float((counts**2).sum())
        if weight:
            margin = unlikely_normal(alpha / len(layers)) * noise_multiplier * (1 + ROUNDING) / math.sqrt(weight)
            found = float((seen * counts).sum()) / weight - margin
            question, words = f"contribution of a row, mostly in {layer}", "at least, over the clip norm"
            stated = 1 + ROUNDING
            findings.append(Finding(question, max(found, 0.0), stated, found > stated, words, int((counts > 0).sum())))
    return findings


def draws(drawn_SN: np.ndarray, sampling_probability: float, alpha: float) -> list[Finding]:
    """Whether rows are drawn as often as stated, each by itself, anew in every step; nothing to test at q = 1.

    Args:
        drawn_SN: bool; which rows each step drew.
        sampling_probability: q as it is stated.
        alpha: see `noise_of_tensors`; of all findings together.
    """
    steps, rows = drawn_SN.shape
    q = sampling_probability
    if q == 1:
        return []
    often = max(
        float(clopper_pearson(int(drawn_SN.sum()), steps * rows, alpha / 6)[0]),
        float(clopper_pearson(drawn_SN.sum(0), steps, alpha / (6 * rows))[0].max()),
    )
    words = "sampling probability of a row, at least"
    found = [Finding("how often a row is drawn", often, q, often > q, words, steps * rows)]
    sizes, (mode, probability) = drawn_SN.sum(1), _mode(rows, q)
    equal = int((sizes == mode).sum())
    question = "batches whose size does not vary as independent draws do"
    found.append(_too_often(question, equal, steps, probability, alpha / 3))
    agree = q * q + (1 - q) * (1 - q)
    first, second = drawn_SN[0 : 2 * (steps // 2) : 2], drawn_SN[1::2]
    question = "rows drawn alike in neighbouring steps"
    return [*found, _too_often(question, int((first == second[: len(first)]).sum()), first.size, agree, alpha / 3)]


def same_draws(ones_SN: np.ndarray, others_SN: np.ndarray, sampling_probability: float, alpha: float) -> list[Finding]:
    """Whether two launches draw the same rows, as they do under a fixed key; nothing to test at q = 1."""
    q = sampling_probability
    if q == 1:
        return []
    agree = q * q + (1 - q) * (1 - q)
    question = "rows drawn alike in two launches"
    return [_too_often(question, int((ones_SN == others_SN).sum()), ones_SN.size, agree, alpha)]


def _mode(rows: int, q: float) -> tuple[int, float]:
    """The most probable size of a draw, and its probability."""
    from scipy.stats import binom

    sizes = np.arange(rows + 1)
    masses = binom.pmf(sizes, rows, q)
    return int(masses.argmax()), float(masses.max())


def _too_often(question: str, hits: int, trials: int, probability: float, alpha: float) -> Finding:
    """Whether something happens more often than with its stated probability."""
    found = float(clopper_pearson(hits, trials, alpha)[0])
    return Finding(question, found, probability, found > probability, "probability, at least", trials)


def _least_noise(question: str, values_SK: Tensor, alpha: float) -> Finding:
    """The least noisy column."""
    squares = values_SK.double().square().sum(0)
    bound = _std_bound(float(squares.min()), len(values_SK), alpha / values_SK.shape[1])
    return _too_little(question, bound, len(values_SK))


def _std_bound(squares: float, number: int, alpha: float) -> float:
    """An upper bound on the standard deviation of so many Gaussian values with this sum of squares."""
    from scipy.stats import chi2

    return math.sqrt(squares / float(chi2.ppf(alpha, number)))


def _too_little(question: str, bound: float, observations: int) -> Finding:
    return Finding(question, bound, 1.0, bound < 1.0, "standard deviation over the stated one, at most", observations)
