"""The privacy loss of one step if a privacy unit has up to k examples, each sampled and clipped on its own.

The number of a unit's examples in a Poisson draw is Binomial(k, q), and each moves the sum by at most C. So the step is
no worse than a mixture of Gaussians with sensitivities 0, C, ..., kC under those probabilities. (Ganesh 2024, "Tight
group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms". Charles et al. 2024,
"Fine-tuning large language models with user-level differential privacy", use it.) Group privacy derived from the
epsilon of one example, k times as large, is far looser.

dp-accounting makes the mixture and discretises it. Only the inversion of the privacy loss is done here, for all points
of the grid at once: dp-accounting searches each point recursively in Python, which takes minutes on fine grids. No
torch in this file.

The Renyi divergences of the same mixture bound a unit at deltas for which privacy loss distributions have no answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import (
    AdjacencyType,
    GaussianPrivacyLoss,
    MixtureGaussianPrivacyLoss,
    MonotonePrivacyLoss,
)
from scipy.stats import binom

_TAIL = 12  # standard deviations beyond the outermost mean: what is left out is below 1e-31 of the sum
_MOST_TERMS = 1_000_000  # points of a grid times means, for one order: 0.05 s
_TABLE, _HALVINGS = 4096, 40  # points of the table of brackets; halvings of a bracket, to 1e-14 of the range


def mixture_of_gaussians(
    noise_multiplier: float, sampling_probability: float, group_size: int, interval: float
) -> PrivacyLossDistribution:
    """The pessimistic privacy loss distribution of one step, for adding or removing a unit of up to k examples.

    Args:
        noise_multiplier: standard deviation of the noise, divided by the sensitivity of one example.
        sampling_probability: probability of one example.
        group_size: k, the maximum number of examples per unit, at least 1.
        interval: width of the grid.
    """
    losses = _losses(noise_multiplier, sampling_probability, group_size)
    return PrivacyLossDistribution(*(_discretised(loss, interval) for loss in losses))


def renyi_divergences(
    noise_multiplier: float, sampling_probability: float, group_size: int, orders: Sequence[int]
) -> np.ndarray:
    """The Renyi divergences of one step, the larger of both directions, for whole orders above 1.

    They are sums over a grid, which for integrands as smooth as these converge to all digits. An order whose grid is
    too large gets infinity.
    """
    if group_size > _MOST_TERMS:
        return np.full(len(orders), math.inf)
    sigma, counts = noise_multiplier, np.arange(group_size + 1.0)
    log_weights = binom.logpmf(counts, group_size, sampling_probability)

    def divergence(order: int) -> float:
        # The integrand has no pole nearer than this width, up to factors that the step of a quarter of it covers.
        width = (1 / (2 * sigma**2) + group_size * (order - 1) / (7 * sigma**4)) ** -0.5
        reach, step = order * group_size + _TAIL * sigma, width / 4
        if 2 * reach / step * (group_size + 1) > _MOST_TERMS:
            return math.inf
        x = np.arange(-reach, reach, step)
        exponents = counts[:, None] * (2 * x - counts[:, None]) / (2 * sigma**2)
        loss = np.logaddexp.reduce(log_weights[:, None] + exponents)
        without = -0.5 * (x / sigma) ** 2 + math.log(step / sigma / math.sqrt(2 * math.pi))
        removed, added = (np.logaddexp.reduce(without + power * loss) for power in (order, 1 - order))
        return float(max(removed, added, 0.0)) / (order - 1)

    return np.array([divergence(int(order)) for order in orders])


def loss_size(noise_multiplier: float, sampling_probability: float, group_size: int) -> tuple[float, float]:
    """(range, standard deviation) of the privacy losses of one step, in nats; the larger of both directions.

    The range divided by a grid's width is its number of points.
    """
    losses: tuple[MonotonePrivacyLoss, ...]
    losses = mixtures = _losses(noise_multiplier, sampling_probability, group_size)
    spread = max(loss.standard_deviation_of_losses() for loss in mixtures)
    if group_size == 1:  # a class with a truncation of its own, which `distributions.one_step` uses
        losses = tuple(
            GaussianPrivacyLoss(
                noise_multiplier, sampling_prob=sampling_probability, adjacency_type=loss.adjacency_type
            )
            for loss in mixtures
        )
    bounds = [loss.connect_dots_bounds() for loss in losses]
    return max(float(one.epsilon_upper - one.epsilon_lower) for one in bounds), spread


def _losses(noise_multiplier: float, sampling_probability: float, group_size: int) -> tuple[_Loss, _Loss]:
    """The privacy losses of (a removal, an addition)."""
    sensitivities = np.arange(group_size + 1, dtype=np.float64)
    probabilities = binom.pmf(sensitivities, group_size, sampling_probability)
    remove, add = (
        _Loss(noise_multiplier, sensitivities, probabilities, adjacency_type=adjacency)
        for adjacency in (AdjacencyType.REMOVE, AdjacencyType.ADD)
    )
    return remove, add


def _discretised(loss: MixtureGaussianPrivacyLoss, interval: float) -> pld_pmf.PLDPmf:
    """Connect the dots: exact at each point of the grid, above the true curve between points."""
    bounds = loss.connect_dots_bounds()
    lower, upper = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
    deltas = loss.get_delta_for_epsilon(np.arange(lower, upper + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, lower, upper, deltas)


class _Loss(MixtureGaussianPrivacyLoss):  # type: ignore[misc]  # dp-accounting has no types
    """dp-accounting's mixture, with an inversion of many privacy losses at once."""

    def inverse_privacy_losses(self, privacy_losses: np.ndarray, precision: float = 1e-6) -> np.ndarray:
        """The x at which the privacy loss has each of the ascending values; +-inf if there is none. It falls with x."""
        del precision  # the result is more precise
        tail = self.privacy_loss_tail()
        spread = tail.upper_x_truncation - tail.lower_x_truncation
        table = np.linspace(tail.lower_x_truncation - spread, tail.upper_x_truncation + spread, _TABLE)
        above = _TABLE - np.searchsorted(self._losses_at(table)[::-1], privacy_losses, side="left")
        low, high = table[np.clip(above - 1, 0, None)], table[np.clip(above, None, _TABLE - 1)]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_large = self._losses_at(middle) > privacy_losses
            low, high = np.where(too_large, middle, low), np.where(too_large, high, middle)
        return np.where(above == 0, -np.inf, np.where(above == _TABLE, np.inf, high))

    def standard_deviation_of_losses(self) -> float:
        """Standard deviation of the privacy loss, in nats, under the data set that has the unit's examples or not."""
        removed = self.adjacency_type == AdjacencyType.REMOVE
        centres, weights = (-self.sensitivities, self.sampling_probs) if removed else (np.zeros(1), np.ones(1))
        z = np.linspace(-10, 10, max(41, 4000 // len(centres)))
        weights = np.outer(weights, np.exp(-0.5 * z * z))
        losses = self._losses_at((centres[:, None] + self._standard_deviation * z).ravel()).reshape(weights.shape)
        mean = np.average(losses, weights=weights)
        return float(np.sqrt(np.average((losses - mean) ** 2, weights=weights)))

    def _losses_at(self, x: np.ndarray) -> np.ndarray:
        """`privacy_loss` at many points."""
        sign = 1 if self.adjacency_type == AdjacencyType.ADD else -1
        total = np.full_like(x, -np.inf)
        for sensitivity, log_probability in zip(self.sensitivities, self._log_sampling_probs, strict=True):
            exponent = sensitivity * (sign * x - sensitivity / 2) / self._variance
            total = np.logaddexp(total, log_probability + exponent)
        return -sign * total
