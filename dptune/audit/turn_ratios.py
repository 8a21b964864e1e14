"""The exact log-likelihood ratio of units whose noise is correlated over steps, for the audit of a training.

A run with b noise bands deals units into b groups by a secret key. A unit may be drawn in every b-th step: in a turn of
its group. The released sums are r = x + sigma C^-1 z along its direction, with x_t = 1 in the steps that drew it. So
w = C r has independent noise, and a unit drawn in step s moves w_s to w_(s+b-1) by the column c of C, of length 1. What
the unit changes is then N(1, sigma^2) against N(0, sigma^2) in the product of c with that part of w. Turns of one group
do not overlap, so their ratios multiply. The group is secret, so the ratio of all is the mean over groups.

Shapes: M units.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from dptune.bands import Bands


class TurnRatios:
    """The ratios of one launch, one step after the other. With one band they are those of independent steps.

    Args:
        bands: the columns of C.
        noise_multiplier: sigma, above 0.
        sampling_probability: with which a unit is drawn per step, on average over its turns; q.
        count: M.
    """

    def __init__(self, bands: Bands, *, noise_multiplier: float, sampling_probability: float, count: int) -> None:
        self._column, self._variance = np.array(bands.coefficients), noise_multiplier**2
        self._often = bands.count * sampling_probability
        self._seen: deque[np.ndarray] = deque(maxlen=bands.count)  # the latest r, newest first
        self._open: deque[np.ndarray] = deque(maxlen=bands.count)  # of the latest turns, newest first
        self._step = 0
        self._closed = np.zeros((bands.count, count))  # by group

    def add(self, seen_M: np.ndarray) -> np.ndarray:
        """The log-likelihood ratios [M] of all steps of the launch so far.

        Args:
            seen_M: what the next step released along each unit's direction, divided by the clip norm.
        """
        b = len(self._column)
        if len(self._open) == b:  # the oldest turn is over
            self._closed[(self._step - b) % b] += self._ratios(self._open.pop(), b)
        self._seen.appendleft(np.asarray(seen_M, dtype=np.float64))
        whitened_M = sum(c * past for c, past in zip(self._column, self._seen, strict=False))
        self._open.appendleft(np.zeros_like(self._seen[0]))
        for age, product_M in enumerate(self._open):
            product_M += self._column[age] * whitened_M
        self._step += 1
        by_group = self._closed.copy()
        for age, product_M in enumerate(self._open):
            by_group[(self._step - 1 - age) % b] += self._ratios(product_M, age + 1)
        ratios_M: np.ndarray = np.logaddexp.reduce(by_group, axis=0) - np.log(b)
        return ratios_M

    def _ratios(self, product_M: np.ndarray, steps: int) -> np.ndarray:
        """Those of one turn, of which so many steps have been seen."""
        length = float((self._column[:steps] ** 2).sum())
        exponents_M = (product_M - length / 2) / self._variance
        with np.errstate(divide="ignore"):  # a unit that is drawn in each turn
            left_out = np.log1p(-self._often)
        ratios_M: np.ndarray = np.logaddexp(left_out, np.log(self._often) + exponents_M)
        return ratios_M
