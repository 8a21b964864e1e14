"""Epsilon without an accountant, exact to about eleven digits at any delta: what the accountants are tested against.

Delta at epsilon is E[max(0, 1 - exp(epsilon - L))] for the total privacy loss L. With M(s) = E[exp(s L)] of one step,
it is the integral of M(s)^n exp(-s epsilon) / (s (s + 1)) / (2 pi i) along any vertical line to the right of 0. Along
the line through the saddle point the integrand is a smooth bump, so sums over grids converge to all digits, and tiny
deltas are as exact as large ones.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr
from scipy.stats import binom


def gaussian_log_delta(mu: float, eps: float) -> float:
    """Balle and Wang 2018, theorem 8; mu is sensitivity / noise."""
    first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
    return float(first + np.log(-np.expm1(second - first)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian release, or of `steps` of them with mu = sqrt(steps) / sigma each."""
    if gaussian_log_delta(mu, 0.0) <= math.log(delta):
        return 0.0
    most = mu * mu / 2 + mu * (1 + math.sqrt(-2 * math.log(delta)))
    return float(brentq(lambda eps: gaussian_log_delta(mu, eps) - math.log(delta), 0.0, most, xtol=1e-13 * most))


class Loss:
    """The total privacy loss of `steps` steps for removing a unit of `group_size` examples; adding it costs less."""

    def __init__(self, sigma: float, q: float, steps: int, group_size: int = 1) -> None:
        counts = np.arange(group_size + 1.0)
        logs = np.log(np.maximum(binom.pmf(counts, group_size, q), 1e-300))
        x = np.arange(-40 * sigma, group_size + 40 * sigma, sigma / 25)
        exponents = logs[:, None] + counts[:, None] * (2 * x - counts[:, None]) / (2 * sigma**2)
        self.loss = np.logaddexp.reduce(exponents)
        self.weight = self.loss - 0.5 * (x / sigma) ** 2 + math.log(1 / 25 / math.sqrt(2 * math.pi))
        self.steps = steps
        self.most = math.log(25 * sigma / group_size)  # beyond, the bump leaves the grid

    def log_delta(self, eps: float) -> float:
        """log of delta at `eps`, for an epsilon above the loss's mean and steps x q above about 10."""
        found = minimize_scalar(lambda c: self._height(math.exp(c), eps), bounds=(-12, self.most), method="bounded")
        c, peak = math.exp(found.x), found.fun
        bend = (self._height(1.01 * c, eps) + self._height(0.99 * c, eps) - 2 * peak) / (0.01 * c) ** 2
        width, total = 1 / math.sqrt(bend) / 8, 0.5
        for first in range(1, 4001, 100):
            values = self._values(c, np.arange(first, first + 100) * width, eps, peak)
            total += values.real.sum()
            if abs(values[-10:]).max() < 1e-13:
                return peak + math.log(total * width / math.pi)
        raise ArithmeticError("the integrand does not end: too few steps")

    def _height(self, c: float, eps: float) -> float:
        """log of the integrand at a real c."""
        return float(self._log_moments(np.array([c + 0j]))[0].real) - c * eps - math.log(c) - math.log1p(c)

    def _values(self, c: float, t: np.ndarray, eps: float, peak: float) -> np.ndarray:
        """The integrand at c + it, divided by exp(peak)."""
        s = c + 1j * t
        return np.asarray(np.exp(self._log_moments(s) - s * eps - np.log(s) - np.log(1 + s) - peak))

    def _log_moments(self, s: np.ndarray) -> np.ndarray:
        """log of M(s)^steps."""
        exponents = self.weight + np.outer(s, self.loss)
        top = exponents.real.max(axis=1)
        return self.steps * (np.log(np.exp(exponents - top[:, None]).sum(axis=1)) + top)
