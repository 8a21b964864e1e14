"""Noise that is correlated over steps: banded matrix factorisation (Choquette-Choo et al. 2023, "(Amplified) Banded
Matrix Factorization: A unified approach to private training"). No torch in this file.

Optimizers add up gradients, so what matters is the noise of sums over steps. Noise that partly takes back that of
earlier steps has smaller sums. Step t adds y_t = (z_t - c_1 y_(t-1) - ... - c_(b-1) y_(t-b+1)) / c_0, with independent
Gaussian z. In matrices over steps, y = C^-1 z with a lower triangular Toeplitz matrix C of b bands. So releasing x + y
is as private as releasing C x + z.

An example that is in step t moves column t of C: by the root of c_0^2 + ... + c_(b-1)^2, in clip norms, at most. That
is 1 here (`Bands.sensitivity`). An example in two steps that are at least b apart moves two columns that have no row in
common. So each of its steps costs what an independent Gaussian release costs. Cyclic Poisson sampling keeps the steps
of an example so far apart (`dptune.sampling`).

Shapes: T steps, b bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dptune._validate import refuse, require_count, require_probability

MOST_BANDS = 64  # the noises of so many steps are kept, less one
KEPT_BYTES = 2 << 30  # of noises that automatic bands may keep
_UNIT = 1e-12  # relative error of a column's length
_FLAT = 1e-9  # slope of the logarithm of the error at which the search for bands ends


@dataclass(frozen=True)
class Bands:
    """The bands of C: c_0 to c_(b-1), as a column of length 1.

    Raises:
        InvalidArgument: there are none or too many, the first is not above 0, or their length is not 1.
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        require_count("bands", self.count)
        if self.count > MOST_BANDS:
            refuse("bands", self.count, f"give at most {MOST_BANDS}: so many noises are kept")
        if not (all(map(math.isfinite, self.coefficients)) and self.coefficients[0] > 0):
            refuse("coefficients", self.coefficients, "the first must be above 0, and all must be finite")
        if not math.isclose(self.sensitivity, 1.0, rel_tol=_UNIT):
            refuse("coefficients", self.coefficients, f"their length must be 1, not {self.sensitivity!r}")

    @property
    def count(self) -> int:
        """b; 1 stands for independent noise."""
        return len(self.coefficients)

    @property
    def sensitivity(self) -> float:
        """The length of a column of C: by how many clip norms one step's example moves C x, at most."""
        return math.hypot(*self.coefficients)

    def matrix(self, steps: int) -> np.ndarray:
        """C, float64 [T, T]."""
        offset = np.arange(steps)[:, None] - np.arange(steps)
        padded = np.append(self.coefficients, 0.0)
        found: np.ndarray = padded[np.where((offset >= 0) & (offset < self.count), offset, self.count)]
        return found

    def std(self, step: int) -> float:
        """The standard deviation of y at `step`, from 1, over that of z."""
        return float(np.linalg.norm(self._inverse(step)))

    def error(self, steps: int) -> float:
        """The root mean square, over all prefixes of the steps, of the standard deviation of the prefix's noise sum."""
        sums = np.cumsum(self._inverse(steps))
        return math.sqrt(float((np.arange(steps, 0, -1) * sums**2).sum()) / steps)

    def _inverse(self, steps: int) -> np.ndarray:
        """The first column of C^-1, float64 [T]."""
        return _over(np.eye(1, steps)[0], np.array(self.coefficients))


INDEPENDENT = Bands((1.0,))


def bands_within(values: int, room: int = KEPT_BYTES) -> int:
    """The most bands whose kept noises fit: b - 1 of them, float64, for each trained value.

    Args:
        values: number of trained values.
        room: bytes.
    """
    require_count("values", values)
    return min(MOST_BANDS, 1 + room // (8 * values))


def require_noise_bands(noise_bands: int, sampling_probability: float) -> None:
    """Refuse a number of bands that cannot be: rows would be drawn more than always in their group's steps.

    Args:
        noise_bands: b.
        sampling_probability: q, of a row whose group is not known.

    Raises:
        InvalidArgument: b is no whole number from 1 to 64, or b q is above 1.
    """
    require_count("noise_bands", noise_bands)
    if noise_bands > MOST_BANDS:
        refuse("noise_bands", noise_bands, f"give at most {MOST_BANDS}: so many noises are kept")
    require_probability("sampling_probability", sampling_probability)
    if noise_bands * sampling_probability > 1:
        told = f"rows would be drawn with probability {noise_bands * sampling_probability:g} when it is their turn"
        remedy = f"give at most {int(1 / sampling_probability)}, or a smaller batch"
        refuse("noise_bands", noise_bands, f"{told}; {remedy}")


@lru_cache(maxsize=256)
def best_bands(count: int, steps: int) -> Bands:
    """The bands with the least `Bands.error` for so many steps.

    Args:
        count: b.
        steps: T.

    Raises:
        InvalidArgument: a number below 1, or too many bands.
    """
    require_count("steps", steps)
    require_count("bands", count)
    if count > MOST_BANDS:
        refuse("bands", count, f"give at most {MOST_BANDS}: so many noises are kept")
    if count == 1:
        return INDEPENDENT
    from scipy.optimize import minimize

    left = np.arange(steps, 0, -1.0) / steps

    def loss(tail: np.ndarray) -> tuple[float, np.ndarray]:
        """(the logarithm of the squared error of 1, *tail as a column of length 1; its gradient by the tail)."""
        bands = np.append(1.0, tail)
        sums = _over(np.ones(steps), bands)
        length, squares = float(bands @ bands), float(left @ sums**2)
        if not math.isfinite(squares):  # bands that the search tries on its way and leaves
            return math.inf, np.zeros_like(tail)
        again, weighted = _over(sums, bands), left * sums
        slopes = np.array([-2 * float(weighted[k:] @ again[: max(0, steps - k)]) for k in range(1, count)])
        return math.log(length * squares), slopes / squares + 2 * tail / length

    start = _root(count)[1:]
    with np.errstate(over="ignore", invalid="ignore"):
        found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": _FLAT}).x
    return Bands(_of_length_one(np.append(1.0, min((start, found), key=lambda tail: loss(tail)[0]))))


def _root(count: int) -> np.ndarray:
    """The first bands of the square root of the matrix of prefix sums: 1, 1/2, 3/8, ... (Fichtenberger et al. 2023)."""
    places = np.arange(1, count)
    return np.append(1.0, np.cumprod((2 * places - 1) / (2 * places)))


def _of_length_one(bands: np.ndarray) -> tuple[float, ...]:
    return tuple((bands / np.linalg.norm(bands)).tolist())


def _over(numerator: np.ndarray, bands: np.ndarray) -> np.ndarray:
    """The power series numerator / bands, as far as the numerator goes."""
    from scipy.signal import lfilter

    found: np.ndarray = lfilter([1.0], bands, numerator)
    return found
