"""One step's privacy loss where a privacy unit has up to k examples, each sampled and clipped by itself.

How many of a unit's examples a Poisson draw holds is Binomial(k, q), and each moves the sum by at most C: the step is
no worse than a mixture of Gaussians with sensitivities 0, C, ..., kC under those probabilities (Ganesh 2024, "Tight
group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms"; used for language models by
Charles et al. 2024, "Fine-tuning large language models with user-level differential privacy"). Group privacy from
one example's epsilon, k times as large, is far looser.

The mixture and the discretisation are dp-accounting's. Only its inversion of the privacy loss, one recursive search in
Python for every point of the grid and minutes on fine ones, is done here for all points at once. No torch in this file.
"""

from __future__ import annotations

import math

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, MixtureGaussianPrivacyLoss
from scipy.stats import binom

_TABLE, _HALVINGS = 4096, 40  # what brackets every point, and how often its bracket is halved: to 1e-14 of the range


def mixture_of_gaussians(
    noise_multiplier: float, sampling_probability: float, group_size: int, interval: float
) -> PrivacyLossDistribution:
    """The pessimistic privacy loss distribution of one step, adding or removing a unit of up to `group_size` examples.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity of one example.
        sampling_probability: of one example.
        group_size: k, at least 1.
        interval: width of the grid.
    """
    losses = _losses(noise_multiplier, sampling_probability, group_size)
    return PrivacyLossDistribution(*(_discretised(loss, interval) for loss in losses))


def loss_range(noise_multiplier: float, sampling_probability: float, group_size: int) -> float:
    """How far the privacy losses of one step spread, in nats: over the grid's width, the points that it takes."""
    bounds = [loss.connect_dots_bounds() for loss in _losses(noise_multiplier, sampling_probability, group_size)]
    return max(float(one.epsilon_upper - one.epsilon_lower) for one in bounds)


def _losses(noise_multiplier: float, sampling_probability: float, group_size: int) -> tuple[_Loss, _Loss]:
    """Of a removal and of an addition."""
    sensitivities = np.arange(group_size + 1, dtype=np.float64)
    probabilities = binom.pmf(sensitivities, group_size, sampling_probability)
    remove, add = (
        _Loss(noise_multiplier, sensitivities, probabilities, adjacency_type=adjacency)
        for adjacency in (AdjacencyType.REMOVE, AdjacencyType.ADD)
    )
    return remove, add


def _discretised(loss: MixtureGaussianPrivacyLoss, interval: float) -> pld_pmf.PLDPmf:
    """Connect the dots: exact at each point of the grid, and above the true curve between them."""
    bounds = loss.connect_dots_bounds()
    lower, upper = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
    deltas = loss.get_delta_for_epsilon(np.arange(lower, upper + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, lower, upper, deltas)


class _Loss(MixtureGaussianPrivacyLoss):  # type: ignore[misc]  # dp-accounting has no types
    """dp-accounting's mixture, its privacy losses inverted all at once."""

    def inverse_privacy_losses(self, privacy_losses: np.ndarray, precision: float = 1e-6) -> np.ndarray:
        """Where the privacy loss, which falls with x, has each of the ascending values; +-inf where it has none."""
        del precision  # finer than asked for
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

    def _losses_at(self, x: np.ndarray) -> np.ndarray:
        """`privacy_loss` of many points."""
        sign = 1 if self.adjacency_type == AdjacencyType.ADD else -1
        total = np.full_like(x, -np.inf)
        for sensitivity, log_probability in zip(self.sensitivities, self._log_sampling_probs, strict=True):
            exponent = sensitivity * (sign * x - sensitivity / 2) / self._variance
            total = np.logaddexp(total, log_probability + exponent)
        return -sign * total
